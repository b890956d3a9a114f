"""Runs the example in two pseudo-terminals of one shell each, and draws both screens as SVG on standard output."""

import html
import os
import pty
import re
import select
import sys
import time

EXAMPLE = sys.argv[1]
PROMPT = "$ "
WIDTH, LINE, LETTER, PAD = 126, 18, 7.25, 14


class Terminal:
    """A shell in a pseudo-terminal, to type into and to read from until it says what is expected."""

    def __init__(self):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            directory = os.path.dirname(EXAMPLE)
            environment = {"PATH": f"{directory}:/usr/bin:/bin", "PS1": PROMPT, "TERM": "dumb", "COLUMNS": "500"}
            os.execve("/bin/sh", ["sh"], environment)
        self.text = self.wait_for(PROMPT)

    def wait_for(self, end, limit=30):
        """What comes until `end` does."""
        text, over = "", time.monotonic() + limit
        while not text.endswith(end):
            if not select.select([self.fd], [], [], max(0, over - time.monotonic()))[0]:
                sys.exit(f"the terminal did not say {end!r}, but {text!r}")
            text += os.read(self.fd, 4096).decode()
        return text

    def type(self, line, end=PROMPT):
        os.write(self.fd, line.encode() + b"\n")
        self.text += self.wait_for(end)

    def lines(self):
        lines = self.text.replace("\r", "").split("\n")
        return lines[:-1] if lines[-1] == PROMPT else lines


def run():
    left, right = Terminal(), Terminal()
    left.type("single_instance 1m", "working for 1m\r\n")
    right.type("single_instance; echo exit $?")
    pid = re.search(r"pid (\d+) holds", left.text)[1]
    right.type(f"kill -9 {pid}")
    left.text += left.wait_for(PROMPT)
    right.type("single_instance 1ms")
    return left.lines(), right.lines()


def settled(screens):
    """The same text for each run: pids by order of appearance, one moment, no spans."""
    pids = {}
    for pid in re.findall(r"(?:pid|-9) (\d+)", "\n".join(line for screen in screens for line in screen)):
        pids.setdefault(pid, str(4242 + 9 * len(pids)))
    for screen in screens:
        for at, line in enumerate(screen):
            line = re.sub(r"(pid|-9) (\d+)", lambda found: f"{found[1]} {pids[found[2]]}", line)
            line = re.sub(r"since .* UTC \(.* ago\)", "since 2026-11-20 17:03:11 UTC (2 s ago)", line)
            screen[at] = line
    return screens


def wrapped(line):
    return [line[at : at + WIDTH] for at in range(0, max(len(line), 1), WIDTH)]


def draw(titles, screens):
    rows, y = [], 0
    for title, screen in zip(titles, screens):
        y += LINE + 6
        rows.append(f'<text x="{PAD}" y="{y}" class="title">{html.escape(title)}</text>')
        for line in screen:
            typed = line.startswith(PROMPT)
            for part in wrapped(line):
                y += LINE
                kind = ' class="typed"' if typed else ""
                rows.append(f'<text x="{PAD}" y="{y}"{kind} xml:space="preserve">{html.escape(part)}</text>')
        y += 8
    width, height = round(WIDTH * LETTER + 2 * PAD), y + PAD
    style = (
        "text{font:12px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#d4d4d4}"
        ".typed{fill:#9cdcfe}.title{fill:#808080;font-style:italic}"
    )
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">')
    print("<title>A program that runs once: a second start is told who runs, a start after a kill who died</title>")
    print(f'<style>{style}</style>\n<rect width="100%" height="100%" rx="8" fill="#1e1e1e"/>')
    print("\n".join(rows) + "\n</svg>")


draw(["a first terminal", "a second terminal, meanwhile"], settled(run()))
