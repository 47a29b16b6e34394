"""Recording of game clips; needs ale-py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("ale_py", reason="needs ale-py")

from iv2_jax.data.decode import VideoReader
from iv2_jax.demo import ale_clips
from iv2_jax.demo.ale_clips import ACTIONS, SAMPLES_PER_STEP, STEPS_PER_FRAME, record, record_clips
from iv2_jax.demo.games import GAMES

BY_ROM = {game.rom: game for game in GAMES}
BREAKOUT, KABOOM = BY_ROM["breakout"], BY_ROM["kaboom"]


def assert_same(a, b):
    for field in dataclasses.fields(a):
        assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_a_recording_follows_from_game_and_seed():
    first = record(KABOOM, 1, num_frames=20)
    record(BREAKOUT, 2, num_frames=4)  # what was played in between does not matter
    again = record(KABOOM, 1, num_frames=20)
    assert [r.action for r in first] == list(ACTIONS)
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    other = record(KABOOM, 2, num_frames=20)
    assert not np.array_equal(first[0].frames, other[0].frames)


def test_shapes_and_step_of_picture_and_sound():
    for recording in record(KABOOM, 0, num_frames=10):
        assert recording.frames.shape == (10, 210, 160, 3)
        assert recording.frames.dtype == np.uint8
        assert recording.sound.shape == (10 * STEPS_PER_FRAME * SAMPLES_PER_STEP,)
        assert recording.sound.dtype == np.int16
        assert recording.rewards.shape == (10,)
        assert recording.sound.std() > 0  # this game hums


def paddle_columns(frames):
    """Middle column of the red paddle of Breakout in each frame; the ball is as red, but small."""
    row = frames[:, 190, 8:152].astype(int)
    red = (row[..., 0] > 150) & (row[..., 1] < 100)
    return np.array([np.median(np.flatnonzero(columns)) for columns in red])


@pytest.mark.parametrize("seed", [0, 4])
def test_the_paddle_goes_where_it_is_pushed(seed):
    none, left, right = (paddle_columns(r.frames) for r in record(BREAKOUT, seed, num_frames=30))
    assert abs(left[0] - right[0]) <= 4  # from the same place
    assert np.ptp(none) <= 2
    assert left[-1] < none[-1] - 12
    assert right[-1] > none[-1] + 12
    # It moves slowly, and for much of the clip rather than at once.
    assert np.abs(np.diff(left)).max() <= 4
    assert np.mean(np.diff(left)[:20] < 0) > 0.5


@pytest.mark.parametrize("seed", [0, 4])
def test_the_player_is_found(seed):
    none, *_ = record(BREAKOUT, seed, num_frames=8)
    column = paddle_columns(none.frames)[0] + 8  # of the whole screen
    assert abs(none.place * none.frames.shape[2] - column) <= 6


@pytest.mark.parametrize("rom", [game.rom for game in GAMES])
def test_left_and_right_look_different_in_every_game(rom):
    _, left, right = record(BY_ROM[rom], 3, num_frames=16)
    early, late = (
        np.abs(left.frames[t].astype(int) - right.frames[t]).sum(-1) > 60 for t in (0, 15)
    )
    assert late.sum() > 8
    assert late.sum() >= early.sum()


def test_starts_without_room_are_left_out(monkeypatch):
    monkeypatch.setattr(ale_clips, "_TRIES", 2)
    monkeypatch.setattr(ale_clips._Player, "moves", lambda *args: False)
    assert record(BREAKOUT, 0, num_frames=2) == []


def test_clips_in_which_the_game_ends_are_not_used(monkeypatch):
    plays = []

    def play(self, start, action, num_frames):
        plays.append(action)
        nothing = np.zeros((num_frames, 1, 1, 3), np.uint8)
        recording = ale_clips.Recording(action, 0.0, nothing, np.zeros(0), np.zeros(0))
        return None if len(plays) == 2 else recording

    monkeypatch.setattr(ale_clips._Player, "play", play)
    assert [r.action for r in record(BREAKOUT, 0)] == list(ACTIONS)
    assert plays == [*ACTIONS, *ACTIONS]


def test_a_game_that_is_over_is_started_again():
    player = ale_clips._Player(BREAKOUT, 0)
    for _ in range(20000):
        if player.ale.game_over():
            break
        player.ale.act(1)
    assert player.ale.game_over()
    assert player.bring() is None or not player.ale.game_over()
    assert player.restart_if_over() is False


def test_files_are_the_same_from_any_number_of_processes(tmp_path):
    settings = {"games": (BREAKOUT,), "train_seeds": (0,), "test_seeds": (10,), "num_frames": 6}
    one = list(record_clips(tmp_path / "one" / "ale", **settings, processes=1))
    two = list(record_clips(tmp_path / "two" / "ale", **settings, processes=2))
    assert one == two
    assert [clip.split for batch in one for clip in batch] == ["train"] * 3 + ["test"] * 3
    for clip in (clip for batch in one for clip in batch):
        files = [tmp_path / n / clip.path for n in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert clip.group == clip.id.rpartition("_")[0]
        with VideoReader(files[0]) as reader:
            assert len(reader) == 6
            assert reader.has_audio
            assert reader.read([0]).shape == (1, *ale_clips.STORED_SIZE, 3)
