"""Run every command of a README, in order: `sh` blocks with bash, `python` blocks with the environment they made."""

import re
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    text = Path(sys.argv[1]).read_text()
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    if not blocks:
        sys.exit("no commands found")
    failed = []
    for kind, block in blocks:
        commands = [block] if kind == "python" else [line for line in block.replace("\\\n", " ").splitlines() if line]
        for command in commands:
            if "pictures" in command and not Path("pictures").exists() and Path(".venv").exists():
                subprocess.run([".venv/bin/python", ".ci/pictures.py"], check=True)
            print(f"\n$ {command}", flush=True)
            start = time.monotonic()
            run = ["bash", "-ec", command] if kind == "sh" else [".venv/bin/python", "-c", command]
            if subprocess.run(run, stdin=subprocess.DEVNULL, check=False).returncode:
                failed.append(command)
            print(f"({time.monotonic() - start:.0f} s)", flush=True)
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
