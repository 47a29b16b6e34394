"""A chat in the terminal: answers appear word by word; commands begin with a slash."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from iv2_jax.errors import UserError
from iv2_jax.talk.session import ChatSession, printable

HELP = """\
Type a question, or
  /clip PATH   look at another clip; the conversation begins anew
  /clear       begin the conversation anew
  /help        this
  /quit        leave (Ctrl-D does too)
Ctrl-C stops an answer. A question that begins with a slash needs a space before it."""


class Terminal:
    """Reads questions from a prompt and writes answers; errors are said, not raised.

    Attributes:
      session: the conversation.
    """

    def __init__(
        self,
        session: ChatSession,
        *,
        read: Callable[[str], str] = input,
        out: TextIO | None = None,
        status: TextIO | None = None,
    ) -> None:
        """Takes the conversation, and where to read and write (by default the terminal)."""
        self.session = session
        self._read = read
        self._out = out or sys.stdout
        self._status = status or sys.stderr

    def run(self) -> None:
        """Goes on until the user leaves."""
        with contextlib.suppress(ImportError):  # line editing, where the platform has it
            import readline  # noqa: F401
        if self.session.clip is None:
            self._say("no clip yet: /clip PATH; until then answers come from text alone")
        self._say("Ask away; /help lists commands, Ctrl-D leaves.")
        while True:
            try:
                line = self._read("> ")
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /quit leaves)")
                continue
            except UnicodeDecodeError:
                self._say("that was no UTF-8 text")
                continue
            if not self._do(line):
                return

    def _do(self, line: str) -> bool:
        """Obeys a command or answers a question; False to leave."""
        command, _, rest = line.strip().partition(" ")
        try:
            if not line.startswith("/"):
                self.answer(line)
            elif command == "/quit":
                return False
            elif command == "/help":
                self._say(HELP)
            elif command == "/clear":
                self.session.clear()
                self._say("the conversation begins anew")
            elif command == "/clip":
                self.show(rest)
            else:
                self._say(f"no command {command}; /help lists them")
        except UserError as error:
            self._say(str(error))
        except KeyboardInterrupt:
            self._say("\n(stopped)")
        return True

    def show(self, path: str) -> None:
        """Looks at a clip and says what was seen.

        Raises:
          DecodeError: it cannot be read; the clip before it stays.
        """
        with self._progress(f"reading {path}"):
            clip = self.session.show(path)
        self._say(f"{clip.path}: {clip.describe()}")
        for note in clip.notes:
            self._say(f"note: {clip.path} {note}")

    def answer(self, question: str) -> None:
        """Writes an answer as it comes; Ctrl-C ends it where it is.

        Raises:
          DataError: the question is empty or too long.
        """
        answer = self.session.ask(question)
        for note in answer.notes:
            self._say(f"note: {note}")
        pieces = iter(answer)
        try:
            why = " (compiling, once for prompts of about this length)" if answer.compiles else ""
            with self._progress(f"thinking{why}"):
                piece = next(pieces, "")
            self._write(piece)
            for piece in pieces:
                self._write(piece)
        except KeyboardInterrupt:
            answer.stop()
        self._write("\n")
        if answer.end == "stopped":
            self._say("(stopped)")
        elif answer.end == "length":
            self._say(f"(cut at {answer.tokens} tokens; --max-tokens allows more)")
        elif not answer.text:
            self._say("(the model had nothing to say)")

    def _write(self, text: str) -> None:
        """Part of an answer; no control character of it reaches the terminal."""
        print(printable(text), end="", file=self._out, flush=True)

    def _say(self, text: str) -> None:
        """A message beside the answers."""
        print(text, file=self._status, flush=True)

    @contextlib.contextmanager
    def _progress(self, text: str) -> Iterator[None]:
        """A line while something takes time, gone afterwards; none where nobody looks."""
        with progress(text, self._status):
            yield


@contextlib.contextmanager
def progress(text: str, out: TextIO) -> Iterator[None]:
    """Shows a line on a terminal while the block runs, and takes it away."""
    shown = out.isatty()
    if shown:
        print(f"{text} ...", end="", file=out, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=out, flush=True)


def ask_all(terminal: Terminal, questions: Sequence[str]) -> None:
    """Answers questions one after the other, for scripts: answers alone go to the output.

    Raises:
      DataError: a question is empty or too long.
    """
    for question in questions:
        terminal.answer(question)
