"""Records labelled clips of Atari games with `ale-py`: real game footage and its sound.

A clip shows two seconds of play while the stick is left alone or pushed left or right. The three
clips of one game and seed start from the very same state of the machine, whose place in the game a
seeded warm-up chooses, so that motion says more than any single frame about which way the stick is
pushed.

* The player is moved at a pace of about half a pixel a step (`Game.pace`): at full speed a paddle
  is at the wall in half a second, at this pace it travels for most of the clip.
* A start is taken only when the player still moves both ways after `_FREE_STEPS` steps, which the
  emulator is asked by trying.
* Files are square: players stand near the lower edge of the 160x210 screen, where the centre crop
  of an evaluation would cut them off.
* The screen is the brighter of two neighbouring steps (60 a second), since these games draw many
  things only every other step.

Everything follows from (game, seed): the emulator is deterministic, the warm-up is drawn from a
seeded generator, and the encoder uses one thread.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import multiprocessing
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from iv2_jax.data.records import Clip
from iv2_jax.demo.encode import Sound, write_clip
from iv2_jax.demo.games import GAMES, Game, describe, sound_facts

if TYPE_CHECKING:
    from ale_py import ALEInterface, ALEState

FPS = Fraction(30)
STEPS_PER_FRAME = 2  # the machine runs at 60 steps a second
NUM_FRAMES = 60
STORED_SIZE = (160, 160)
ACTIONS = ("none", "left", "right")
TRAIN_SEEDS = range(10)
TEST_SEEDS = range(10, 16)

# The emulator gives 512 samples a step whatever its nominal rate, so this rate is in step.
SAMPLES_PER_STEP = 512
SOUND_RATE = SAMPLES_PER_STEP * int(FPS) * STEPS_PER_FRAME

_FREE_STEPS = 24
_TRIES = 60
_CROSSING = 280  # steps from wall to wall at the pace of a clip
_SETTLE = 12  # steps in which the player comes to rest
_MOVED_PIXELS = 8  # pixels that must differ for a player to count as moved
_MOVED_BY = 30  # sum over the three colours from which on a pixel differs

# Codes of ale_py.Action: stick without and with the button.
_STICK = {"none": (0, 1), "left": (4, 12), "right": (3, 11)}


@dataclasses.dataclass(frozen=True)
class Recording:
    """One clip before it is written.

    Attributes:
        action: what the stick does, one of `ACTIONS`.
        place: where the player is at first, a share of the screen's width.
        frames: (T, H, W, 3) uint8 RGB, 30 a second.
        sound: (T * 1024,) int16, `SOUND_RATE` Hz, in step with the frames.
        rewards: (T,) float, change of the score during each frame.
    """

    action: str
    place: float
    frames: np.ndarray
    sound: np.ndarray
    rewards: np.ndarray


def record(game: Game, seed: int, num_frames: int = NUM_FRAMES) -> list[Recording]:
    """Plays one game from one seeded start, once per action.

    Args:
        game: what is played.
        seed: chooses the start.
        num_frames: length of a clip at 30 frames a second.

    Returns:
        A recording per action, in the order of `ACTIONS`; empty when no start was found from
        which the player moves both ways.

    Raises:
        ImportError: `ale-py` is not installed.
    """
    player = _Player(game, seed)
    for start in player.starts():
        recordings = [player.play(start, action, num_frames) for action in ACTIONS]
        if None not in recordings:
            place = find_player(*(r.frames for r in recordings if r.action != "none"))
            return [dataclasses.replace(r, place=place) for r in recordings]
    return []


def find_player(left: np.ndarray, right: np.ndarray) -> float:
    """Where the player of two clips from one start is at first.

    What first differs between a push to the left and one to the right is the player, whichever
    game it is.

    Args:
        left: (T, H, W, 3) uint8, the stick pushed to the left.
        right: (T, H, W, 3) uint8, to the right.

    Returns:
        The middle of the columns that differ in the first frame in which more than a few pixels
        do, as a share of the width; both edges of a player change, the rest of it does not.
    """
    for pair in zip(left, right, strict=True):
        columns = np.nonzero(_changed(*pair))[1]
        if len(columns) > _MOVED_PIXELS:
            return float(np.percentile(columns, (10, 90)).mean() + 0.5) / left.shape[2]
    return 0.5


class _Start(NamedTuple):
    """Where the clips of a seed start: so many steps after a state of the machine."""

    state: ALEState
    run_up: tuple[int, ...]


class _Player:
    """A console with a game in it, and a seeded hand on the stick.

    Loading takes 0.15 s, yet every (game, seed) gets a console of its own: a saved state does not
    hold the sound chip's, so that the sound would depend on what was played before.
    """

    def __init__(self, game: Game, seed: int) -> None:
        import ale_py
        from ale_py import roms

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.game = game
        self.ale: ALEInterface = ale_py.ALEInterface()
        self.ale.setInt("random_seed", seed)
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setBool("sound_obs", True)
        self.ale.loadROM(roms.get_rom_path(game.rom))
        self.ale.reset_game()
        self.rng = np.random.default_rng([seed, zlib.crc32(game.rom.encode())])

    def starts(self) -> Iterator[_Start]:
        """Plays a while, then brings the player to seeded places, and yields those free both ways.

        The machine may be left in any state between two of them.
        """
        self.wander(self.game.intro + int(self.rng.integers(180)))
        for _ in range(_TRIES):
            start = self.bring()
            if start is None:
                continue
            state = self.ale.cloneState(include_rng=True)
            if all(self.moves(state, action) for action in ("left", "right")):
                yield start
            self.ale.restoreState(state)

    def wander(self, steps: int) -> None:
        """Pushes the stick at full speed for stretches of seeded length and direction."""
        while steps > 0:
            stretch = min(int(self.rng.integers(4, 40)), steps)
            self.push(ACTIONS[self.rng.integers(len(ACTIONS))], stretch)
            self.restart_if_over()
            steps -= stretch

    def bring(self) -> _Start | None:
        """Brings the player to a wall and from there a seeded way back, so that it may be anywhere.

        Returns:
            The start, or None if the game was over on the way.
        """
        crossing = int(_CROSSING * self.game.pace)
        there, back = self.rng.permutation(["left", "right"])
        way_back = int(self.rng.integers(crossing))
        self.push(there, crossing)
        if self.restart_if_over():
            return None
        state = self.ale.cloneState(include_rng=True)
        codes = self.push(back, way_back) + self.push("none", _SETTLE)
        return None if self.restart_if_over() else _Start(state, tuple(codes))

    def restart_if_over(self) -> bool:
        """Starts a new game when this one is over, in which the machine no longer runs."""
        over = self.ale.game_over()
        if over:
            self.ale.reset_game()
        return over

    def push(self, action: str, steps: int) -> list[int]:
        """Pushes the stick at full speed; gives the codes played."""
        codes = [_STICK[action][int(self.button(i))] for i in range(steps)]
        for code in codes:
            self.ale.act(code)
        return codes

    def button(self, number: int) -> bool:
        """Whether the button is pressed in a step."""
        return number % self.game.fire_every == 0

    def moves(self, state: ALEState, action: str) -> bool:
        """Whether an action moves the player at once and after `_FREE_STEPS` steps still does."""
        free, soon = _FREE_STEPS, _FREE_STEPS // 2
        return _differ(
            self._try(state, [action] * soon), self._try(state, ["none"] * soon)
        ) and _differ(
            self._try(state, [action] * 2 * free),
            self._try(state, [action] * free + ["none"] * free),
        )

    def _try(self, state: ALEState, actions: Sequence[str]) -> np.ndarray:
        """The screen after these actions."""
        self.ale.restoreState(state)
        for i, action in enumerate(actions):
            self.step(i, action)
        return self.ale.getScreenRGB()

    def step(self, number: int, action: str) -> float:
        """One step of a clip, at the game's pace; gives the change of the score."""
        pace, button = self.game.pace, int(self.button(number))
        if self.game.paddle:
            return self.ale.act(_STICK[action][button], pace)
        pushed = int((number + 1) * pace) > int(number * pace)
        return self.ale.act(_STICK[action if pushed else "none"][button])

    def play(self, start: _Start, action: str, num_frames: int) -> Recording | None:
        """Records frames, sound and score from a start on; None if the game ends on the way."""
        self.ale.restoreState(start.state)
        for code in start.run_up:  # sets the sound chip to this moment's sound
            self.ale.act(code)
        frames, sound, rewards = [], [], []
        for number in range(num_frames * STEPS_PER_FRAME):
            reward = self.step(number, action)
            screen = self.ale.getScreenRGB()
            sound.append(self.ale.getAudio())
            if number % STEPS_PER_FRAME == 0:
                frames.append(screen)
                rewards.append(reward)
            else:
                frames[-1] = np.maximum(frames[-1], screen)
                rewards[-1] += reward
        if self.ale.game_over():
            return None
        return Recording(action, math.nan, np.stack(frames), _pcm(sound), np.array(rewards))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two screens differ in more than a few pixels."""
    return int(np.sum(_changed(a, b))) > _MOVED_PIXELS


def _changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The pixels (H, W) in which two screens differ."""
    return np.abs(a.astype(np.int16) - b.astype(np.int16)).sum(-1) > _MOVED_BY


def _pcm(steps: Sequence[np.ndarray]) -> np.ndarray:
    """The emulator's unsigned bytes as int16 around zero.

    Its chip only pushes one way, so that silence sits at a level of its own; taking the clip's
    median away puts it at zero.
    """
    samples = np.concatenate(steps).astype(np.float32)
    return np.clip((samples - np.median(samples)) * 128, -32768, 32767).astype(np.int16)


def record_clips(
    folder: Path,
    *,
    games: Sequence[Game] = GAMES,
    train_seeds: Iterable[int] = TRAIN_SEEDS,
    test_seeds: Iterable[int] = TEST_SEEDS,
    num_frames: int = NUM_FRAMES,
    processes: int = 2,
) -> Iterator[list[Clip]]:
    """Records and writes the clips of all games and seeds.

    Args:
        folder: where the files go; paths of the clips are relative to its parent.
        games: what is played.
        train_seeds: seeds of split `train`.
        test_seeds: seeds of split `test`.
        num_frames: length of a clip.
        processes: how many play side by side; 1 stays in this process.

    Yields:
        The three clips of each (game, seed), in order; an empty list where no start was found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        (folder, game, seed, split, num_frames)
        for game in games
        for split, seeds in (("train", train_seeds), ("test", test_seeds))
        for seed in seeds
    ]
    if processes == 1:
        yield from map(_record_task, tasks)
        return
    # Spawned, not forked: the caller may have JAX's threads running.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_record_task, tasks)


def _record_task(task: tuple[Path, Game, int, str, int]) -> list[Clip]:
    """Records one (game, seed), writes its files and describes them."""
    folder, game, seed, split, num_frames = task
    clips = []
    for recording in record(game, seed, num_frames):
        name = f"{game.rom}_{seed:02d}_{recording.action}"
        sound = Sound(recording.sound, SOUND_RATE)
        write_clip(folder / f"{name}.mp4", recording.frames, fps=FPS, size=STORED_SIZE, sound=sound)
        facts = describe(
            game,
            recording.action,
            recording.place,
            recording.rewards,
            sound_facts(recording.sound, num_frames),
        )
        clips.append(
            Clip(
                id=name,
                path=f"{folder.name}/{name}.mp4",
                split=split,
                group=f"{game.rom}_{seed:02d}",
                audio=True,
                **facts,
            )
        )
    return clips
