"""Find the links of a built site that lead nowhere, and what its pages would fetch from another host.

`python site/check_links.py FOLDER` prints one line for each, with page and link, and fails if there is one. Addresses of other
hosts are links like any, but not fetched; no script, style, image or frame may come from there.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])
        elif tag in _LOADED and given.get(_LOADED[tag]) and given.get("rel") != "canonical":
            self.loaded.add(given[_LOADED[tag]])


def find_broken(folder: Path) -> list[str]:
    "One line for each link in the `.html` files under `folder` that leads nowhere, and for each thing loaded from another host."
    folder = folder.resolve()
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links | page.loaded):
            parts = urlsplit(link)
            if parts.scheme == "data" or parts.scheme in ("http", "https", "mailto") and link not in page.loaded:
                continue
            if parts.scheme or parts.netloc:
                broken.append(f"{path.relative_to(folder)}: {link} is loaded from another host")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or folder not in target.parents:
                broken.append(f"{path.relative_to(folder)}: {link} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(folder)}: {link} has no such anchor")
    for style in sorted(folder.rglob("*.css")):
        for address in re.findall(r"url\(\s*[\"']?(https?:[^\"')]+)", style.read_text(encoding="utf-8")):
            broken.append(f"{style.relative_to(folder)}: {address} is loaded from another host")
    return broken


if __name__ == "__main__":
    found = find_broken(Path(sys.argv[1]))
    print("\n".join(found) or "every link leads somewhere")
    sys.exit(bool(found))
