"""The chat in the terminal: commands, answers as they come, what goes where, ways out."""

from __future__ import annotations

import io

import pytest

from iv2_jax.errors import DataError
from iv2_jax.talk import terminal as terminal_lib
from iv2_jax.talk.model import AnswerOptions
from iv2_jax.talk.session import ChatSession
from iv2_jax.talk.terminal import Terminal, ask_all
from tests.data import clips
from tests.talk.scripted import Scripted


class Tty(io.StringIO):
    def isatty(self):
        return True


def _run(model, *lines, clip=None, status=None, max_tokens=40):
    """Types lines, an exception standing for what a key raises; gives what was printed."""
    typed = iter([*lines, EOFError()])

    def read(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    session = ChatSession(model, AnswerOptions(max_tokens=max_tokens))
    out, status = io.StringIO(), status or io.StringIO()
    terminal = Terminal(session, read=read, out=out, status=status)
    if clip:
        terminal.show(clip)
    terminal.run()
    return out.getvalue(), status.getvalue(), session


def test_a_conversation(tmp_path):
    path = str(clips.write_clip(tmp_path / "a.mp4", 8))
    out, said, session = _run(Scripted("A dog.", "It runs."), "Who?", "And?", clip=path)
    assert out == "A dog.\nIt runs.\n"
    assert f"{path}: 4 frames of 0.3 s, at " in said
    assert [turn.answer for turn in session.turns] == ["A dog.", "It runs."]


def test_commands(tmp_path):
    path = str(clips.write_clip(tmp_path / "my clip.mp4", 8))
    out, said, session = _run(
        Scripted("Yes."),
        "/help",
        "/nothing",
        "Hi?",
        f"/clip {path}",
        "/clip gone.mp4",
        "Hi?",
        "/clear",
        "",
        " /not a command",
        "/quit",
        "never asked",
    )
    assert out == "Yes.\nYes.\nYes.\n"
    for text in (
        "no clip yet: /clip PATH",
        "/clear       begin the conversation anew",
        "no command /nothing; /help lists them",
        "my clip.mp4: 4 frames",
        "gone.mp4: does not exist",
        "the conversation begins anew",
        "the question is empty",
    ):
        assert text in said
    assert session.clip.path == path
    assert [turn.question for turn in session.turns] == ["/not a command"]


def test_keys_stop_an_answer_and_not_the_program():
    class Interrupted(Scripted):
        def stream(self, *args, **options):
            for number, ids in enumerate(super().stream(*args, **options)):
                if number == 2 and not self.prompts[1:]:
                    raise KeyboardInterrupt
                yield ids

    model = Interrupted("a long answer", "whole")
    out, said, session = _run(model, "Hi?", KeyboardInterrupt(), "And?")
    assert out == "a lo\nwhole\n"
    assert "(stopped)" in said
    assert "(Ctrl-D or /quit leaves)" in said
    assert [turn.answer for turn in session.turns] == ["a lo", "whole"]


def test_answers_that_end_early_or_are_empty():
    out, said, _ = _run(Scripted("a very long answer"), "Hi?", max_tokens=6)
    assert out == "a very\n"
    assert "(cut at 6 tokens; --max-tokens allows more)" in said
    _, said, _ = _run(Scripted(""), "Hi?")
    assert "(the model had nothing to say)" in said


def test_no_control_character_of_an_answer_reaches_the_terminal():
    out, _, _ = _run(Scripted("\x1b[2Ja\x07\nb"), "Hi?")
    assert out == "[2Ja\nb\n"


def test_wrong_bytes_and_left_out_turns():
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")
    model = Scripted("word " * 5, context=120)
    _, said, _ = _run(model, broken, "x" * 30, "y" * 30)
    assert "that was no UTF-8 text" in said
    assert "note: the earliest turn was left out" in said


def test_progress_is_shown_to_people_alone():
    with terminal_lib.progress("reading", Tty()) as nothing:
        assert nothing is None
    out = Tty()
    with terminal_lib.progress("reading", out):
        assert out.getvalue() == "reading ..."
    assert out.getvalue() == "reading ...\r\033[K"
    _, said, _ = _run(Scripted("Yes."), "Hi?")
    assert "thinking" not in said


def test_questions_of_scripts():
    out = io.StringIO()
    session = ChatSession(Scripted("one", "two"), AnswerOptions(max_tokens=40))
    terminal = Terminal(session, out=out, status=io.StringIO())
    ask_all(terminal, ["a?", "b?"])
    assert out.getvalue() == "one\ntwo\n"
    with pytest.raises(DataError, match="empty"):
        ask_all(terminal, [" "])
