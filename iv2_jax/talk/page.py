"""A chat on a local web page, made with Gradio: nothing is fetched from, or told to, the outside.

Each browser tab has a conversation of its own; the model answers one question at a time, the others
wait in a queue. What the user can mend is said in a message, and the page stays as it is.
"""

from __future__ import annotations

import contextlib
import html
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.data.decode import DecodeError
from iv2_jax.errors import UserError
from iv2_jax.talk.clip import VIDEOS, SeenClip, open_clip, small
from iv2_jax.talk.model import AnswerOptions, TalkModel
from iv2_jax.talk.quiet_gradio import gr
from iv2_jax.talk.session import ChatSession, printable

_NO_CLIP = "No clip yet: answers come from text alone."
_GREEDY, _DRAWN = "likeliest words", "drawn words"

Message = dict[str, str]


class _Tab:
    """What a browser tab talks about.

    Attributes:
      session: its conversation.
      messages: what the page shows of it.
      stop: set to end the answer that is being written.
    """

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self.messages: list[Message] = []
        self.stop = threading.Event()


class ChatPage:
    """The handlers behind the page; `build` lays it out.

    Attributes:
      model: who answers.
      options: how; the page chooses between greedy and drawn answers, and the seed.
      examples: clips to pick from.
    """

    def __init__(
        self, model: TalkModel, options: AnswerOptions, examples: Sequence[str] = ()
    ) -> None:
        """Takes the model, the settings of answers and the clips to pick from."""
        self.model, self.options, self.examples = model, options, list(examples)
        self._tabs: dict[str, _Tab] = {}

    def build(self) -> gr.Blocks:
        """Lays the page out."""
        title = f"iv2 chat: {Path(self.model.name).name}"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=360):
                    pick, drop, player = self._clip_side()
                with gr.Column(scale=6, min_width=400):
                    talk, box, send, stop, clear, style, seed = self._talk_side()
                    seen, frames = self._seen()
            shown = [player, seen, frames, talk]
            if pick is not None:
                pick.select(self.pick, None, shown)
            drop.upload(self.drop, drop, shown)
            gr.on(
                [box.submit, send.click],
                self.ask,
                [box, style, seed],
                [talk, box],
                concurrency_limit=1,
                trigger_mode="multiple",  # a question asked meanwhile waits for its turn
                concurrency_id="model",
            )
            stop.click(self.stop, None, None, queue=False)
            gr.on([clear.click, talk.clear], self.clear, None, talk, queue=False)
            page.unload(self.leave)
        return page.queue(max_size=32)

    def _clip_side(self) -> tuple[Any, ...]:
        """Clips to pick, a place to drop one, and a player."""
        pick = None
        if self.examples:
            gr.Markdown("**Pick a clip**")
            pick = gr.Gallery(
                value=[(_thumbnail(path), Path(path).name) for path in self.examples],
                show_label=False,
                columns=4,
                height=290 if len(self.examples) > 4 else 170,
                object_fit="contain",
                allow_preview=False,
                buttons=[],
                interactive=False,
                elem_id="examples",
            )
        drop = gr.File(
            label="or drop a video or a picture", file_count="single", height=140, elem_id="drop"
        )
        player = gr.Video(label="Clip", interactive=False, height=260, visible=False, buttons=[])
        return pick, drop, player

    def _seen(self) -> tuple[Any, ...]:
        """What was seen of the clip, in words and pictures."""
        seen = gr.Markdown(_NO_CLIP, elem_id="seen")
        frames = gr.Gallery(
            show_label=False,
            columns=4,
            height="auto",
            object_fit="contain",
            buttons=[],
            interactive=False,
            visible=False,
            elem_id="frames",
        )
        return seen, frames

    def _talk_side(self) -> tuple[Any, ...]:
        """The conversation and what it is led with."""
        talk = gr.Chatbot(
            label="Conversation",
            height=400,
            # Text as it is: markup that somebody types, or the model writes, is text.
            render_markdown=False,
            buttons=["copy"],
            feedback_options=None,
            placeholder="Pick or drop a clip, then ask about it.",
            elem_id="talk",
        )
        with gr.Row():
            box = gr.Textbox(
                show_label=False,
                placeholder="Ask about the clip",
                lines=1,
                max_lines=6,
                scale=8,
                autofocus=True,
                elem_id="question",
            )
            send = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop")
        with gr.Row():
            drawn = self.options.temperature > 0
            style = gr.Radio(
                [_GREEDY, _DRAWN],
                value=_DRAWN if drawn else _GREEDY,
                label="Answers",
                scale=5,
                min_width=330,
                elem_id="style",
            )
            seed = gr.Number(
                self.options.seed, label="Seed", precision=0, minimum=0, scale=1, min_width=90
            )
            clear = gr.Button("Clear", scale=1, min_width=120, elem_id="clear")
        return talk, box, send, stop, clear, style, seed

    # -- handlers --------------------------------------------------------------------------------

    def pick(self, event: gr.SelectData, request: gr.Request) -> list[Any]:
        """Shows an example."""
        return self._show(self.examples[event.index], request)

    def drop(self, path: str | None, request: gr.Request) -> list[Any]:
        """Shows a clip that was dropped."""
        if path is None:
            gr.Warning("No file came through; drop it again.")
            return [gr.skip()] * 4
        return self._show(path, request)

    def _show(self, path: str, request: gr.Request) -> list[Any]:
        """Looks at a clip and begins a new conversation about it."""
        tab = _Tab(ChatSession(self.model, self.options))
        try:
            clip = tab.session.show(path)
        except UserError as error:
            text = str(error).replace(path, Path(path).name)
            _say(text)
            return [
                gr.skip(),
                f"**That clip cannot be used.** {_plain(text)}",
                gr.skip(),
                gr.skip(),
            ]
        self._replace(request, tab)
        notes = "".join(f"\n\nNote: it {note}." for note in clip.notes)
        return [
            gr.Video(value=path if _has_player(path) else None, visible=_has_player(path)),
            f"It saw of **{_plain(Path(path).name)}** {clip.describe()}{notes}",
            gr.Gallery(value=_captioned(clip), columns=_columns(clip), visible=True),
            [],
        ]

    def ask(
        self, question: str, style: str, seed: float | None, request: gr.Request
    ) -> Iterator[Any]:
        """Answers, word by word."""
        tab = self._tab(request)
        tab.stop.clear()
        try:
            answer = tab.session.ask(question or "", self._options(style, seed))
        except UserError as error:
            _say(str(error))
            yield gr.skip(), gr.skip()
            return
        tab.messages.append({"role": "user", "content": _literal(question.strip())})
        waiting = "… (compiling, once for prompts of about this length)" if answer.compiles else "…"
        reply = {"role": "assistant", "content": waiting}
        tab.messages.append(reply)
        notes = "".join(f"(note: {note})\n" for note in answer.notes)
        yield tab.messages, ""  # the box is emptied once: the next question may be typed meanwhile
        with contextlib.closing(iter(answer)) as pieces:
            for _ in pieces:
                reply["content"] = notes + _literal(answer.text)
                if tab.stop.is_set():
                    break
                yield tab.messages, gr.skip()
        reply["content"] = notes + (_literal(answer.text) or "(nothing to say)")
        if answer.end == "stopped":
            reply["content"] += "\n(stopped)"
        elif answer.end == "length":
            reply["content"] += f"\n(cut at {answer.tokens} tokens)"
        yield tab.messages, gr.skip()

    def stop(self, request: gr.Request) -> None:
        """Ends the tab's answer where it is."""
        self._tab(request).stop.set()

    def clear(self, request: gr.Request) -> list[Message]:
        """Begins a new conversation about the same clip."""
        tab = _Tab(self._tab(request).session.fresh())
        self._replace(request, tab)
        return tab.messages

    def leave(self, request: gr.Request) -> None:
        """Forgets a tab that was closed."""
        tab = self._tabs.pop(request.session_hash, None)
        if tab is not None:
            tab.stop.set()

    def _tab(self, request: gr.Request) -> _Tab:
        """The tab that asks."""
        name = request.session_hash
        if name not in self._tabs:
            self._tabs[name] = _Tab(ChatSession(self.model, self.options))
        return self._tabs[name]

    def _replace(self, request: gr.Request, tab: _Tab) -> None:
        """Puts a new conversation into a tab; an answer under way is for the old one, and ends."""
        self._tab(request).stop.set()
        self._tabs[request.session_hash] = tab

    def _options(self, style: str, seed: float | None) -> AnswerOptions:
        """The settings with what the page chose."""
        given = self.options.temperature
        temperature = 0.0 if style == _GREEDY else (given or 1.0)
        chosen = 0 if seed is None else int(seed)
        return AnswerOptions(self.options.max_tokens, temperature, self.options.top_p, chosen)


def _say(text: str) -> None:
    """Shows a message on the page of whoever asked."""
    gr.Warning(html.escape(text), duration=15, title="That did not work")


def _literal(text: str) -> str:
    """A text that the page shows letter by letter: what looks like markup is no markup."""
    return html.escape(printable(text), quote=False)


def _captioned(clip: SeenClip) -> list[tuple[np.ndarray, str]]:
    """Frames with the time of each."""
    return list(zip(clip.frames, clip.captions, strict=True))


def _columns(clip: SeenClip) -> int:
    """Frames in a row of the gallery."""
    return min(max(len(clip.frames), 2), 4)


def _has_player(path: str) -> bool:
    """Whether a browser may play the file."""
    return Path(path).suffix.lower() in VIDEOS


def _plain(name: str) -> str:
    """A file's name without what Markdown would read as markup."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-.!|" else c for c in name)


def _thumbnail(path: str) -> np.ndarray:
    """A frame of the middle of a clip; a grey one where it cannot be read, which picking tells."""
    try:
        clip = open_clip(path)
        try:
            return small(clip.read([len(clip) // 2])[0])
        finally:
            clip.close()
    except DecodeError:
        return np.full((90, 120, 3), 128, np.uint8)
