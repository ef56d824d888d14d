"""Follows a guide as its reader does, section by section (`## Title`).

A `bash` block is run by bash and a `python` block by Python, one process a section, from the top of the repository;
what they write lies in a copy of it. A `text` block after either holds all that it prints. The line above a block may
say more, `<!-- serves; needs vllm openai -->`: the command is a server, which runs until the next one or the end of
the section, while the blocks after it wait until its `--port` answers (the test takes a free one); `needs` names the
modules without which the block is left out.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.loopback import free_port, serving


ROOT = Path(__file__).resolve().parents[1]
KEPT_OUT = ("build", "runs_output")
# Executes every line of its input, which holds code, and answers with what that printed.
EXECUTES_LINES = """
import contextlib, io, json, sys

names = {"__name__": "__main__"}
for line in sys.stdin:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(json.loads(line), "guide", "exec"), names)
    print(json.dumps(printed.getvalue()), flush=True)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a guide."""

    language: str
    code: str
    serves: bool = False
    needs: tuple[str, ...] = ()
    prints: str | None = None


def sections(guide: str) -> dict[str, str]:
    """Texts by title."""
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", guide, re.DOTALL | re.MULTILINE))


def blocks_of(section: str) -> list[Block]:
    """In order, each with the output that follows it."""
    found = re.findall(r"(?:^<!-- (.*?) -->\n)?^```(\w+)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    blocks: list[Block] = []
    for mark, language, code in found:
        if language == "text":
            blocks[-1] = Block(**{**vars(blocks[-1]), "prints": code})
        else:
            needs = re.search(r"needs ([\w ]+)", mark)
            blocks.append(Block(language, code, "serves" in mark, tuple(needs[1].split()) if needs else ()))
    return blocks


def with_free_ports(section: str) -> str:
    for port in set(re.findall(r"--port (\d+)", section)):
        section = re.sub(rf"(--port |:){port}\b", rf"\g<1>{free_port()}", section)
    return section


def copy_by_links(folder: Path) -> Path:
    """The repository's files, without environments and what runs left behind."""
    folder.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in KEPT_OUT:
            (folder / entry.name).symlink_to(entry)
    return folder


class Reader:
    """Follows sections in `folder` with one Python and its environment.

    `lacking` collects the modules for want of which blocks were left out.
    """

    def __init__(self, folder: Path, python: Path, env: dict[str, str], server_limit_s: float = 120):
        self.folder, self.python, self.server_limit_s = folder, python, server_limit_s
        self.env = {**env, "PATH": os.pathsep.join([str(python.parent), env["PATH"]])}
        self.lacking: list[str] = []

    def follow(self, section: str) -> list[int]:
        """The numbers of the blocks that were run.

        Raises:
            AssertionError: If a block fails, or prints something else than the guide says.
        """
        done = []
        with ExitStack() as servers, self.executing() as execute:
            for number, block in enumerate(blocks_of(with_free_ports(section))):
                if not self.has(block.needs):
                    continue
                if block.serves:
                    servers.close()
                    servers.enter_context(self.serve(block.code))
                else:
                    printed = execute(block.code) if block.language == "python" else self.bash(block.code)
                    if block.prints is not None:
                        assert printed.strip() == block.prints.strip(), block.code
                done.append(number)
        return done

    def has(self, modules: tuple[str, ...]) -> bool:
        command = f"from importlib.util import find_spec; print([m for m in {modules} if not find_spec(m)])"
        absent = [] if not modules else eval(subprocess.check_output([self.python, "-c", command], text=True))
        self.lacking += absent
        return not absent

    def serve(self, code: str):
        (port,) = re.findall(r"--port (\d+)", code)
        log = self.folder / "server.log"
        return serving(["bash", "-c", code], int(port), log, self.env, self.folder, self.server_limit_s)

    def bash(self, code: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def executing(self) -> Iterator:
        errors = self.folder / "python.log"
        with errors.open("w") as log:
            command = [self.python, "-c", EXECUTES_LINES]
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdin=pipe, stdout=pipe, stderr=log, text=True
            )

            def execute(code: str) -> str:
                process.stdin.write(json.dumps(code) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                assert answer, f"{code}\n{errors.read_text()}"
                return json.loads(answer)

            with process:
                try:
                    yield execute
                finally:
                    process.kill()
