"""The games of the demo, and what can be said about a clip of them.

Captions, labels and answers are composed from facts of the recording (game, where the player is,
stick, score, loudness) with sentences of our own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Game:
    """One game.

    Attributes:
        rom: name of the ROM in `ale-py`, and label.
        title: its name in captions.
        player: what the stick moves.
        scene: what else is to be seen.
        pace: share of full speed at which the player moves about half a pixel a step (60 steps a
            second, some 130 pixels from wall to wall).
        paddle: the player is moved by a paddle, which can be turned slowly, not by a stick, which
            is pushed in a share `pace` of the steps instead.
        intro: steps until the game listens to the stick.
        fire_every: the button is pressed every so many steps: to shoot, or to serve.
    """

    rom: str
    title: str
    player: str
    scene: str
    pace: float
    intro: int
    fire_every: int
    paddle: bool = False


GAMES = (
    Game(
        "breakout",
        "Breakout",
        "paddle",
        "a ball flies below rows of coloured bricks",
        0.09,
        60,
        32,
        True,
    ),
    Game(
        "kaboom",
        "Kaboom!",
        "stack of buckets",
        "a bomber walks along the top of a wall above a green field",
        0.09,
        60,
        32,
        True,
    ),
    Game(
        "assault",
        "Assault",
        "cannon at the bottom",
        "a mother ship and its small craft hover in a black sky",
        0.2,
        240,
        20,
    ),
    Game(
        "space_invaders",
        "Space Invaders",
        "green cannon",
        "a block of yellow aliens marches above three orange shields",
        1.0,
        200,
        20,
    ),
    Game(
        "demon_attack",
        "Demon Attack",
        "purple cannon",
        "winged demons hover over a blue ground",
        0.5,
        120,
        20,
    ),
    Game("phoenix", "Phoenix", "ship", "birds fly in a black sky", 0.5, 200, 20),
    Game(
        "galaxian",
        "Galaxian",
        "white ship",
        "a formation of coloured aliens hangs above",
        0.5,
        200,
        20,
    ),
    Game(
        "tennis",
        "Tennis",
        "player in pink",
        "another player stands across the net of a green court",
        0.5,
        200,
        32,
    ),
    Game(
        "gopher",
        "Gopher",
        "farmer",
        "a gopher digs in the brown earth below the carrots",
        0.5,
        200,
        20,
    ),
    Game(
        "boxing",
        "Boxing",
        "white boxer",
        "a black boxer fights back in a green ring seen from above",
        0.5,
        120,
        20,
    ),
)

_MOVES = {
    "none": ("is left alone", "stays without orders", "nowhere"),
    "left": ("moves to the left", "is steered to the left", "left"),
    "right": ("moves to the right", "is steered to the right", "right"),
}
# (in a clause of its own, after what is done, after a movement away from it)
_PLACES = {
    "left": ("on the left", "on the left side", "from the left side"),
    "middle": ("near the middle", "in the middle", "from the middle"),
    "right": ("on the right", "on the right side", "from the right side"),
}
_LEFT_OF, _RIGHT_OF = 0.4, 0.6  # shares of the screen's width between which it is the middle
_SOUNDS = {
    "silent": "No sound.",
    "bursts": "Short electronic sounds of the game {title} with silence between them.",
    "steady": "Electronic sound of the game {title} all the time.",
}
_AUDIBLE = 200.0  # standard deviation of int16 samples within a frame
_SILENT_SHARE, _STEADY_SHARE = 0.05, 0.8


@dataclasses.dataclass(frozen=True)
class SoundFacts:
    """What is heard.

    Attributes:
        kind: `silent`, `bursts` or `steady`.
        first: first frame with sound, None when there is none.
    """

    kind: str
    first: int | None


def sound_facts(samples: np.ndarray, num_frames: int) -> SoundFacts:
    """Measures loudness frame by frame.

    Args:
        samples: (n,) int16 of the whole clip; n is a multiple of `num_frames`.
        num_frames: frames of the clip.

    Returns:
        The facts: `silent` when fewer than 5 % of the frames sound, `steady` from 80 % on.
    """
    audible = samples.reshape(num_frames, -1).astype(np.float64).std(1) > _AUDIBLE
    share = audible.mean()
    if share < _SILENT_SHARE:
        return SoundFacts("silent", None)
    kind = "steady" if share >= _STEADY_SHARE else "bursts"
    return SoundFacts(kind, int(np.argmax(audible)))


def place_name(place: float) -> str:
    """'left', 'middle' or 'right' for a share of the screen's width."""
    return "left" if place < _LEFT_OF else "right" if place > _RIGHT_OF else "middle"


def describe(
    game: Game, action: str, place: float, rewards: np.ndarray, sound: SoundFacts
) -> dict[str, Any]:
    """Captions, labels and question-answer pairs of a clip, as fields of `Clip`.

    Args:
        game: what is played.
        action: what the stick does: none, left or right.
        place: where the player is at first, a share of the screen's width.
        rewards: (T,) change of the score in each frame.
        sound: from `sound_facts`.

    Returns:
        Fields `captions` (video, audio), `labels` (topic, game, place, action, score, sound) and
        `qa`.
    """
    moves, steered, answer = _MOVES[action]
    where = place_name(place)
    beside, inside, away = _PLACES[where]
    changes = np.flatnonzero(rewards)
    score = "yes" if len(changes) else "no"
    scored = "and the score changes" if len(changes) else "and the score stays the same"
    qa = [
        ("Which game is this?", game.title),
        (f"Where is the {game.player} at first?", where),
        (f"Which way is the {game.player} steered?", answer),
        ("Does the score change?", score),
        ("Is there any sound?", "no" if sound.kind == "silent" else "yes"),
    ]
    half = len(rewards) / 2
    if len(changes) and (changes[-1] < half or changes[0] >= half):
        when = "first" if changes[0] < half else "second"
        qa.append(("In which half of the clip does the score change?", when))
    if len(changes) and sound.first not in (None, changes[0]):
        first = "sound" if sound.first < changes[0] else "score"
        qa.append(("Which comes first, a sound or a change of the score?", first))
    return {
        "captions": {
            "video": (
                f"{game.title}: the {game.player}, {beside} at first, {moves} while {game.scene}.",
                f"In the video game {game.title} the {game.player} {steered} "
                f"{inside if action == 'none' else away}, {scored}.",
            ),
            "audio": (_SOUNDS[sound.kind].format(title=game.title),),
        },
        "labels": {
            "topic": "video game",
            "game": game.rom,
            "place": where,
            "action": action,
            "score": score,
            "sound": sound.kind,
        },
        "qa": tuple(qa),
    }
