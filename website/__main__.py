"""`python -m website [FOLDER]`: writes the pages, builds the site, and follows every link of it; the number of dead ones."""

import shutil
import subprocess
import sys
from pathlib import Path

from website.links import dead_links
from website.pages import REPOSITORY, write_pages


def main(folder: Path) -> int:
    """The site, in `FOLDER/site`; returns 0 where it was built without a warning and without a dead link."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pages").mkdir(parents=True)
    write_pages(folder / "pages")
    settings = (REPOSITORY / "website" / "zensical.toml").read_text()
    (folder / "zensical.toml").write_text(settings.replace("../../src", str(REPOSITORY / "src")))
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, check=False)
    dead = dead_links(folder / "site")
    print(*dead, f"{folder / 'site'}: {len(dead)} dead links", sep="\n")
    return 1 if built.returncode or dead else 0


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:]) if sys.argv[1:] else REPOSITORY / ".cache" / "site"))
