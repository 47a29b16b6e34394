"""The web page: its handlers, and all of it in a headless browser."""

from __future__ import annotations

import contextlib
import os
import shutil
from types import SimpleNamespace

import pytest

from iv2_jax import cli
from iv2_jax.data.decode import DecodeError
from iv2_jax.errors import ConfigError
from iv2_jax.talk.model import AnswerOptions
from tests.data import clips
from tests.talk.scripted import Scripted

pytest.importorskip("gradio", reason="needs the extra `chat`")

from iv2_jax.talk import page as page_lib
from iv2_jax.talk import serving
from iv2_jax.talk.page import ChatPage
from iv2_jax.talk.quiet_gradio import gr

pytestmark = pytest.mark.browser  # all of them: the extra is installed where these are asked for

ONE, TWO = SimpleNamespace(session_hash="one"), SimpleNamespace(session_hash="two")
OPTIONS = AnswerOptions(max_tokens=40)


@pytest.fixture
def said(monkeypatch):
    """Messages that the page shows."""
    messages = []
    monkeypatch.setattr(gr, "Warning", lambda text, **options: messages.append(text))
    return messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips to pick from."""
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(("first.mp4", "second clip.mp4")):
        clips.write_clip(folder / name, range(100 * number, 100 * number + 24))
    return folder


def _page(*answers, examples=(), **options):
    return ChatPage(Scripted(*answers, **options), OPTIONS, examples)


def _ask(page, question, tab=ONE):
    """What the conversation looks like after each step."""
    states = []
    for talk, _ in page.ask(question, page_lib._GREEDY, 0, tab):
        states.append(talk if talk == gr.skip() else [dict(message) for message in talk])
    return states


def _texts(messages):
    return [message["content"] for message in messages]


def test_an_answer_appears_word_by_word_and_tabs_are_apart(said):
    page = _page("A dog runs.", "Two.", "Three.")
    states = _ask(page, "What <b>happens</b>?")
    growing = [_texts(state)[1] for state in states]
    assert growing[0] == "… (compiling, once for prompts of about this length)"
    assert growing[-1] == "A dog runs."
    assert len(set(growing)) > 5
    assert all(growing[-1].startswith(text) for text in growing[1:])
    assert _texts(states[-1])[0] == "What &lt;b&gt;happens&lt;/b&gt;?"  # shown as it was typed
    assert _texts(_ask(page, "And?", TWO)[-1]) == ["And?", "Two."]
    assert _texts(_ask(page, "And?")[-1])[2:] == ["And?", "Three."]
    assert page.clear(ONE) == []
    assert len(page._tab(TWO).messages) == 2
    page.leave(ONE)
    assert set(page._tabs) == {"two"}
    assert said == []


def test_mistakes_are_messages_and_change_nothing(said, tmp_path):
    page = _page("Yes.", context=120)
    _ask(page, "Hi?")
    assert _ask(page, "  ") == [gr.skip()]
    assert _ask(page, "x" * 200) == [gr.skip()]
    junk = tmp_path / "junk <b>.mp4"
    junk.write_bytes(bytes(100))
    shown = page.drop(str(junk), ONE)
    assert shown[1] == (
        "**That clip cannot be used.** junk \\<b\\>\\.mp4: cannot be opened: "
        "Invalid data found when processing input"
    )
    assert page.drop(None, ONE)[0] == gr.skip()
    assert said[0] == "the question is empty: type what you want to know"
    assert "the question is too long: it needs 2" in said[1]
    assert said[2].startswith("junk &lt;b&gt;.mp4: cannot be opened")  # without the folder
    assert said[3] == "No file came through; drop it again."
    assert _texts(page._tab(ONE).messages) == ["Hi?", "Yes."]


def test_stopping_and_picking_while_an_answer_is_written(folder, said):
    paths = serving.example_clips([str(folder)])
    page = _page("a very long answer", "another", examples=paths)
    states = page.ask("Hi?", page_lib._GREEDY, 0, ONE)
    for _ in range(4):
        next(states)
    page.stop(ONE)
    talk, _ = list(states)[-1]
    assert _texts(talk) == ["Hi?", "a very l\n(stopped)"]
    states = page.ask("Hi?", page_lib._GREEDY, 0, ONE)
    next(states)
    _, seen, frames, talk = page.pick(SimpleNamespace(index=1), ONE)
    assert seen.startswith("It saw of **second clip\\.mp4** 4 frames of 1.0 s, at ")
    assert len(frames.value) == 4
    assert talk == []
    list(states)  # the old answer ends, and is not part of the new conversation
    assert page._tab(ONE).messages == []
    assert page._tab(ONE).session.turns == []
    assert page._tab(ONE).session.clip.path == paths[1]


def test_answers_are_greedy_or_drawn():
    page = ChatPage(Scripted("yes"), AnswerOptions(temperature=0.5, seed=3))
    assert page._options(page_lib._GREEDY, 7) == AnswerOptions(seed=7)
    assert page._options(page_lib._DRAWN, None) == AnswerOptions(temperature=0.5, seed=0)


def test_examples_and_ports(folder, tmp_path):
    found = serving.example_clips([str(folder), str(folder / "first.mp4")])
    assert [os.path.basename(path) for path in found] == [
        "first.mp4", "second clip.mp4", "first.mp4",
    ]  # fmt: skip
    with pytest.raises(DecodeError, match="holds no video"):
        serving.example_clips([str(tmp_path)])
    with pytest.raises(DecodeError, match=r"gone\.mp4: does not exist"):
        serving.example_clips([str(tmp_path / "gone.mp4")])
    port = serving.free_port("127.0.0.1", 0)
    assert serving.free_port("127.0.0.1", port) == port
    with pytest.raises(ConfigError, match="try --port 0"):
        serving.free_port("127.0.0.1", 1 << 20)


def test_questions_are_for_the_terminal(capsys):
    assert cli.main(["chat", "--serve", "--ckpt", "x", "--question", "Hi?"]) == 2
    assert "--question is for the terminal" in capsys.readouterr().err


# In a browser -----------------------------------------------------------------------------------

# Without them Chromium looks for hosts of its maker.
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def _served(model, folder):
    page, address = serving.serve(model, OPTIONS, [str(folder)], port=0, wait=False)
    try:
        yield address
    finally:
        page.close(verbose=False)


def test_the_page_in_a_browser(browser, folder, tmp_path):
    model = Scripted("A <b>dog</b> runs.", "It was </s>.", "long " * 300, "Mine.", pause=0.05)
    (tmp_path / "junk.mp4").write_bytes(bytes(100))
    with _served(model, folder) as address:
        tab = browser.new_page()
        requests = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(address)
        # A clip that is picked, and the frames seen of it.
        tab.locator("#examples button.thumbnail-item").nth(1).click()
        tab.get_by_text("4 frames of 1.0 s").wait_for()
        assert tab.locator("#frames img").count() == 4
        # An answer that appears bit by bit, letters that look like markup as letters.
        grown = _ask_in(tab, "What <i>is</i> it?", "A <b>dog</b> runs.")
        assert len(grown) > 3
        tab.get_by_text("What <i>is</i> it?").wait_for()
        _ask_in(tab, "And then?", "It was </s>.")
        assert "[INST] What <i>is</i> it? [/INST]A <b>dog</b> runs.</s>" in model.prompt()
        # Stopping.
        tab.fill("#question textarea", "Tell me more")
        tab.click("#ask")
        tab.get_by_text("long long").wait_for()
        tab.click("#stop")
        tab.get_by_text("(stopped)").wait_for()
        # Another tab has a conversation of its own.
        other = browser.new_page()
        other.goto(address)
        _ask_in(other, "Hi?", "Mine.")
        assert "What <i>is</i> it?" not in other.locator("#talk").inner_text()
        assert model.prompt() == "<s>Watch.[INST] [/INST] [INST] Hi? [/INST]"
        # Mistakes are messages; the clip and the conversation stay.
        tab.locator("#drop input[type=file]").set_input_files(str(tmp_path / "junk.mp4"))
        tab.get_by_text("That clip cannot be used.").wait_for()
        tab.fill("#question textarea", "   ")
        tab.click("#ask")
        tab.get_by_text("the question is empty").wait_for()
        assert "Traceback" not in tab.content()
        assert "It was </s>." in tab.locator("#talk").inner_text()
        tab.click("#clear")
        tab.get_by_text("It was </s>.").wait_for(state="detached")
        # A clip that is dropped.
        dropped = clips.write_clip(tmp_path / "mine.mp4", 50)
        _drop(tab, dropped)
        tab.get_by_text("4 frames of 2.0 s").wait_for()
        local = ("data:", "blob:", address)
        assert [url for url in requests if not url.startswith(local)] == []


def _ask_in(tab, question, answer):
    """Asks and waits for the answer; gives the texts that were there on the way."""
    tab.fill("#question textarea", question)
    tab.keyboard.press("Enter")
    found, talk = [], tab.locator("#talk")
    for _ in range(400):
        text = talk.inner_text()
        if not found or text != found[-1]:
            found.append(text)
        if answer in text:
            return found
        tab.wait_for_timeout(20)
    raise AssertionError(f"no {answer!r} in {found[-1]!r}")


def _drop(tab, path):
    """Drops a file after the one that is there."""
    inputs = tab.locator("#drop input[type=file]")
    if inputs.count() == 0:
        tab.locator("#drop button").first.click()
        inputs.first.wait_for(state="attached")
    inputs.first.set_input_files(str(path))
