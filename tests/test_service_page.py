"""The page of the service in a real browser, and what it is made of."""

import base64
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from tests.service_world import ANN, IDS, exports, running

pytestmark = pytest.mark.lane("standing")
NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser, until the end of a `with` block."""

    def __init__(self, folder: Path):
        self.problems: list[str] = []  # of the page: exceptions, errors on the console, what was not loaded
        self._number = 0
        self._buffer = b""
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--window-size=1200,1000"]
        shell = f'exec "$@" 3<&{commands} 4>&{answers}'  # the browser reads and writes the files of these numbers
        command, silent = ["bash", "-c", shell, "bash", str(PROGRAM), *flags, "about:blank"], subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(commands, answers), stderr=silent, stdout=silent)
        os.close(commands)
        os.close(answers)
        self._session: dict[str, str] = {}
        page = next(target for target in self.send("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def send(self, method: str, **parameters: Any) -> Any:
        """The answer to a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 30.0) -> Any:
        """The value of an expression, once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; the page says {self.run('document.body.innerText')!r}"
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path, *, width: int = 1200) -> bytes:
        """A PNG of the whole page."""
        for height in (800, None):  # how high the page is depends on its width
            height = height or self.run("document.documentElement.scrollHeight")
            self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        png = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(png)
        return png

    def _message(self) -> Any:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            assert part, "the browser ended"
            self._buffer += part
        raw, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(raw)

    def _note(self, event: Any) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"].get("exception", {}).get("description")))
        if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])


def test_contributions_of_a_ranking():
    with running(exports().root / "one") as service, service.client() as client:
        status, answer = client.post("/v1/explain", ANN | {"candidates": IDS, "k": 5})
        ranked = client.rank(**ANN, candidates=IDS, k=5)
        assert status == 200 and answer["ids"] == [str(number) for number in ranked["ids"]]
        assert set(answer["contributions"]) == {"dot_product"}  # all that a two-tower model has
        added = np.array(ranked["logits"]) - exports().params["one"]["head"]["bias"]
        np.testing.assert_allclose(answer["contributions"]["dot_product"], added, atol=1e-4)
        assert {span[0] for span in answer["spans"]} >= {"user", "score", "total"}
        _, answer = client.post("/v1/explain", {"user": "nobody", "candidates": IDS, "k": 5})
        assert answer["degraded"] and answer["contributions"] == {}


@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium (Debian package chromium)")
def test_the_page_in_a_browser(tmp_path):
    """Screenshots go to the folder that AIF_JAX_SCREENSHOTS names, to be looked at."""
    import matplotlib.image

    root = tmp_path / "root"
    exports().copied(root)
    (root / "current").write_text("one\ntwo share=0.3\n")
    pictures = Path(os.environ.get("AIF_JAX_SCREENSHOTS", tmp_path))
    with running(root, token="open sesame") as service, service.client() as client, Browser(tmp_path / "profile") as browser:
        for user in range(40):
            client.rank(**{**ANN, "user": f"u{user}"}, candidates=IDS, k=5)
        browser.send("Page.navigate", url=service.addresses["http"])
        browser.until("document.querySelector('#state.bad') && document.querySelector('#state').innerText.includes('Bearer')")
        browser.problems.clear()  # those of the refusal
        browser.run("token.value = 'open sesame'; token.dispatchEvent(new Event('change'))")
        browser.until("document.querySelectorAll('#models tbody tr').length === 2")
        words = browser.run("document.querySelector('#models').innerText")
        assert "70 %" in words and "30 %" in words and exports().index["one"].version[:12] in words
        assert browser.run("document.querySelector('#state').innerText").startswith("ready")
        stages = browser.run("[...document.querySelectorAll('#stages .row')].map((row) => row.firstChild.textContent)")
        assert stages[0] == "features" and stages[-2:] == ["critical", "total"]
        lanes = browser.run("[...document.querySelectorAll('#timeline .row')].map((row) => row.firstChild.textContent)")
        assert lanes == ["user side", "interaction", "critical path", ""]

        fields = {"user": "ann", "k": "5", "candidates": " ".join(map(str, IDS)), "record": json.dumps({"user": "ann"})}
        script = "".join(f"document.forms[0].elements[{json.dumps(k)}].value = {json.dumps(v)};" for k, v in fields.items())
        browser.run(script + "document.forms[0].querySelector('button').click()")
        browser.until("document.querySelectorAll('#result tbody tr').length === 5")
        expected = client.rank(user="ann", record={"user": "ann"}, events={}, candidates=IDS, k=5)
        shown = browser.run("[...document.querySelectorAll('#result tbody tr')].map((row) => row.children[1].innerText)")
        assert shown == [str(number) for number in expected["ids"]]
        assert "dot_product" in browser.run("document.querySelector('#result thead').innerText")
        large = '{"item": [9007199254740993]}'  # no number of JavaScript
        browser.run("sent = new FormData(document.forms[0]); sent.set('candidates', '7 9007199254740993')")
        browser.run(f"sent.set('events', '{large}')")
        body = '{"user":"ann","candidates":[7,9007199254740993],"k":5,"record":{"user": "ann"},"events":' + large + "}"
        assert browser.run("bodyOf(sent)") == body
        # the interaction begins after the user side
        spans = browser.run(
            "Object.fromEntries([...document.querySelectorAll('#timeline .span')].map((span) => "
            "[span.title.split(' ')[0], [span.parentElement.previousSibling.textContent, parseFloat(span.style.left)]]))"
        )
        lane, left = ({stage: value[place] for stage, value in spans.items()} for place in (0, 1))
        assert left["features"] < left["user"] < left["score"]
        assert (lane["user"], lane["score"]) == ("user side", "interaction")
        picture = matplotlib.image.imread(io.BytesIO(browser.screenshot(pictures / "service_page.png")))
        assert picture.shape[1] == 1200 and picture.std() > 0.05, "the picture is blank"
        narrow = matplotlib.image.imread(io.BytesIO(browser.screenshot(pictures / "service_page_narrow.png", width=480)))
        assert narrow.shape[1] == 480
        browser.run("drawTimeline([['features', -0.04, 0.01], ['total', 0, 0.02]])")  # of a state that another request began
        assert browser.run("document.querySelector('#timeline .span').style.cssText") == "left: 0%; width: 50%;"

        browser.run("document.forms[0].elements.record.value = ''; document.forms[0].querySelector('button').click()")
        browser.until("document.querySelector('#answer').innerText.includes('Degraded')")
        assert "late or failed" in browser.run("document.querySelector('#timeline').innerText")
        browser.run("document.forms[0].elements.k.value = 99; document.forms[0].querySelector('button').click()")
        browser.until("document.querySelector('#answer.bad') !== null")
        assert "expected 1 to max_k=8" in browser.run("document.querySelector('#answer').innerText")
        assert [problem for problem in browser.problems if "400" not in problem] == []  # of the call with k = 99
        (root / "current").write_text("<b>bold</b>\n")
        browser.until("document.querySelector('#problem').innerText.includes('<b>bold</b>')")
