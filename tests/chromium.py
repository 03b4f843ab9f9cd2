"""Headless Chromium, driven through its debugging pipe: JSON, each ended by a zero."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time

PATH = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
OPTIONS += ["--disable-background-networking", "--force-device-scale-factor=1"]
# Whatever a page may ask for: no other host can be looked up.
OPTIONS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


class Page:
    """A tab. requests: URLs that it asked for; complaints: what its console said."""

    def __init__(self, write, read):
        self._write, self._read, self._number, self._session = write, read, 0, None
        self.requests, self.complaints = [], []
        (target, *_) = [
            one
            for one in self("Target.getTargets")["targetInfos"]
            if one["type"] == "page"
        ]
        attached = self(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session = attached["sessionId"]
        for domain in ("Page", "DOM", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """The result of a command of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith("Browser."):
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            said = self._next()
            if said.get("id") == self._number:
                assert "error" not in said, (method, said["error"])
                return said["result"]

    def _next(self):
        content = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            content += byte
        said = json.loads(content)
        method, about = said.get("method"), said.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(about))
        if method == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.complaints.append(json.dumps(about))
        return said

    def value(self, expression):
        """What an expression of JavaScript is."""
        said = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def wait_for(self, expression):
        """Returns when it is true; an error after half a minute."""
        for _ in range(100):
            if self.value(expression):
                return
            time.sleep(0.1)
        raise AssertionError(
            f"{expression} did not come true: {self.complaints}; "
            f"{self.value('document.body.innerText')}"
        )

    def choose_file(self, selector, path):
        """As a user chooses a file to upload."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path):
        """Writes a PNG of the page."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def opened(folder):
    """A `Page` of a new profile in the folder, to which downloads go."""
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(PATH), *OPTIONS, profile, "--remote-debugging-pipe", "about:blank"]
    shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    browser = subprocess.Popen(
        ["bash", "-c", shell, "chromium", *command],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in), os.close(theirs_out)
    with os.fdopen(ours_out, "wb") as write, os.fdopen(ours_in, "rb") as read:
        try:
            page = Page(write, read)
            page(
                "Browser.setDownloadBehavior",
                behavior="allow",
                downloadPath=str(folder),
            )
            yield page
        finally:
            browser.kill()
            browser.wait(30)
