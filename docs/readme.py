"""Write what the READMEs show of the doctor: its text, and the picture of its page.

python docs/readme.py            runs the train.py of README.md, writes text and picture
python docs/readme.py --check    exit code 1 if the text is not up to date; no picture

The picture needs Chromium. It keeps the findings that it shows in the file itself, so
that a test can tell an old one.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).parents[1]
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
PICTURE = ROOT / "docs" / "images" / "doctor.png"
BEGIN = "<!-- begin: python docs/readme.py -->"
END = "<!-- end: python docs/readme.py -->"
# Of the page, in CSS pixels: the outcome and the first findings.
SIZE = "960,900"


def train_py(readme: Path = READMES[0]) -> str:
    """Return the train.py that a README shows."""
    found = re.search(r"```python\n(# train\.py\n.*?)```", readme.read_text(), re.S)
    if found is None:
        sys.exit(f"{readme} shows no block that begins with # train.py")
    return found[1]


def diagnose(folder: Path) -> tuple[str, Path]:
    """Run the doctor on that train.py; return the first lines, and the page."""
    (folder / "train.py").write_text(train_py())
    page = folder / "doctor.html"
    done = subprocess.run(
        [
            Path(sys.executable).with_name("normkit"),
            "doctor",
            "train.py:make",
            f"--report={page}",
        ],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 1:
        sys.exit(f"the doctor found no error:\n{done.stdout}{done.stderr}")
    lines = done.stdout.split("\n\n")[0].splitlines()
    return "\n".join(map(str.rstrip, lines)), page


def with_block(text: str, verdict: str) -> str:
    """Return a README with the text of the doctor between its marks."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    block = f"```console\n$ normkit doctor train.py:make\n{verdict}\n```"
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def words(text: str) -> str:
    """Return the text without its numbers, which differ a little between machines."""
    return re.sub(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", "#", text)


def note_of(picture: Path) -> str:
    """Return the text that is kept in a picture."""
    with Image.open(picture) as image:
        return image.text.get("Description", "")  # type: ignore[attr-defined]


def photograph(page: Path, verdict: str) -> None:
    """Write the picture of a page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("the picture needs Chromium, which is not installed")
    taken = page.with_suffix(".png")
    subprocess.run(
        [
            chromium,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=1.5",
            f"--window-size={SIZE}",
            f"--screenshot={taken}",
            page.as_uri(),
        ],
        capture_output=True,
        check=True,
    )
    note = PngInfo()
    note.add_itxt("Description", words(verdict))
    PICTURE.parent.mkdir(exist_ok=True)
    with Image.open(taken) as image:
        image.convert("RGB").save(PICTURE, optimize=True, pnginfo=note)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        verdict, page = diagnose(Path(name))
        if "--check" not in sys.argv[1:]:
            photograph(page, verdict)
    old = {readme: readme.read_text(encoding="utf-8") for readme in READMES}
    new = {readme: with_block(text, verdict) for readme, text in old.items()}
    if "--check" in sys.argv[1:]:
        stale = [r.name for r in READMES if words(old[r]) != words(new[r])]
        if note_of(PICTURE) != words(verdict):
            stale.append(PICTURE.name)
        if stale:
            sys.exit(f"{', '.join(stale)} is not up to date; run python docs/readme.py")
    else:
        for readme, text in new.items():
            readme.write_text(text, encoding="utf-8")
