"""Records labelled clips of Atari games with `ale-py`: real game footage and its sound.

A clip shows two seconds of play while the stick is left alone or pushed left or right. The three
clips of one game and seed start from the very same state of the machine, whose place in the game a
seeded warm-up chooses, so that what differs between them is the motion alone: a single frame says
little about which way the stick is pushed.

* Pushing is spread over the clip (`Game.hold`): at full speed a paddle is at the wall in half a
  second, at about half a pixel a step it travels for most of the clip.
* A start is taken only when the player still moves both ways after `_FREE_STEPS` steps, which the
  emulator is asked by trying.
* The screen is the brighter of two neighbouring steps (60 a second), since these games draw many
  things only every other step.

Everything follows from (game, seed): the emulator is deterministic, the warm-up is drawn from a
seeded generator, and the encoder uses one thread.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iv2_jax.data.records import Clip
from iv2_jax.demo.encode import Sound, write_clip
from iv2_jax.demo.games import GAMES, Game, describe, sound_facts

if TYPE_CHECKING:
    from ale_py import ALEInterface, ALEState

FPS = Fraction(30)
STEPS_PER_FRAME = 2  # the machine runs at 60 steps a second
NUM_FRAMES = 60
ACTIONS = ("none", "left", "right")
TRAIN_SEEDS = range(10)
TEST_SEEDS = range(10, 16)

# The emulator gives 512 samples a step whatever its nominal rate, so this rate is in step.
SAMPLES_PER_STEP = 512
SOUND_RATE = SAMPLES_PER_STEP * int(FPS) * STEPS_PER_FRAME

_FREE_STEPS = 24
_TRIES = 100
_STEPS_BETWEEN_TRIES = 24
_MOVED_PIXELS = 8  # pixels that must differ for a player to count as moved
_MOVED_BY = 30  # sum over the three colours from which on a pixel differs

# Codes of ale_py.Action: stick without and with the button.
_STICK = {"none": (0, 1), "left": (4, 12), "right": (3, 11)}


@dataclasses.dataclass(frozen=True)
class Recording:
    """One clip before it is written.

    Attributes:
        action: what the stick does, one of `ACTIONS`.
        frames: (T, H, W, 3) uint8 RGB, 30 a second.
        sound: (T * 1024,) int16, `SOUND_RATE` Hz, in step with the frames.
        rewards: (T,) float, change of the score during each frame.
    """

    action: str
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
    start = player.find_start()
    if start is None:
        return []
    return [player.play(start, action, num_frames) for action in ACTIONS]


class _Player:
    """A console with a game in it, and a seeded hand on the stick."""

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

    def find_start(self) -> ALEState | None:
        """Warms up, then plays on until the player can move both ways."""
        self.wander(self.game.intro + int(self.rng.integers(180)))
        for _ in range(_TRIES):
            state = self.ale.cloneState(include_rng=True)
            if all(self.moves(state, action) for action in ("left", "right")):
                return state
            self.ale.restoreState(state)
            self.wander(_STEPS_BETWEEN_TRIES)
        return None

    def wander(self, steps: int) -> None:
        """Pushes the stick at full speed for stretches of seeded length and direction."""
        longest = max(9, int(200 * self.game.hold))  # at most about 100 pixels
        done = 0
        while done < steps:
            action = ACTIONS[self.rng.integers(len(ACTIONS))]
            for _ in range(min(int(self.rng.integers(4, longest)), steps - done)):
                self.step(done, action, hold=1.0)
                done += 1
            if self.ale.game_over():
                self.ale.reset_game()

    def moves(self, state: ALEState, action: str) -> bool:
        """Whether the player is still moving after `_FREE_STEPS` steps of an action."""
        steps = 2 * _FREE_STEPS
        on = self._try(state, [action] * steps)
        stopped = self._try(state, [action] * _FREE_STEPS + ["none"] * _FREE_STEPS)
        still = self._try(state, ["none"] * steps)
        return _differ(on, stopped) and _differ(on, still)

    def _try(self, state: ALEState, actions: Sequence[str]) -> np.ndarray:
        """The screen after these actions."""
        self.ale.restoreState(state)
        for i, action in enumerate(actions):
            self.step(i, action)
        return self.ale.getScreenRGB()

    def step(self, number: int, action: str, hold: float | None = None) -> float:
        """One step of the machine; the stick is pushed in a share `hold` of the steps."""
        hold = self.game.hold if hold is None else hold
        pushed = int((number + 1) * hold) > int(number * hold)
        button = number % self.game.fire_every == 0
        return self.ale.act(_STICK[action if pushed else "none"][int(button)])

    def play(self, state: ALEState, action: str, num_frames: int) -> Recording:
        """Records frames, sound and score from a state on."""
        self.ale.restoreState(state)
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
        return Recording(action, np.stack(frames), _pcm(sound), np.array(rewards))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two screens differ in more than a few pixels."""
    change = np.abs(a.astype(np.int16) - b.astype(np.int16)).sum(-1)
    return int(np.sum(change > _MOVED_BY)) > _MOVED_PIXELS


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
        write_clip(folder / f"{name}.mp4", recording.frames, fps=FPS, sound=sound)
        facts = describe(
            game, recording.action, recording.rewards, sound_facts(recording.sound, num_frames)
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
