"""Make training text for a real teacher from Debian and Python packages, without the Hugging Face hub.

    python -m support.corpus FOLDER            files of JSON lines, field text, for halo.py --data

    prose.jsonl     pages of manuals, from the Debian packages in PACKAGES
    code.jsonl      modules of the Python packages that are installed here
    long.jsonl      books for stage 3: pages or modules in a row. None of them is in the two files above
    unseen.jsonl    essays on politics, to measure with: the other files have no text of this kind
    sources.json    the files and their hashes, the Debian packages with versions and hashes, the Python
                    packages with versions

The same packages give the same files. This needs apt-get (after apt-get update) and dpkg, but no root.
Four names in PACKAGES are of Debian 12: libboost1.81-doc, linux-doc-6.1, postgresql-doc-15 and
python3.11-doc. On another release, mend these names.
"""
import gzip
import json
import os
import random
import re
import subprocess
import sysconfig
import tempfile
from collections import Counter
from functools import partial
from html import unescape
from importlib.metadata import distributions
from itertools import accumulate, chain, groupby
from pathlib import Path
from urllib.parse import unquote

from tqdm import tqdm

from hypenet import write_file
from support.common import Parser, command_line, filled, hash_file, number, one_line, write_json

PACKAGES = """apache2-doc bind9-doc cmake-doc debian-handbook debian-reference-en developers-reference
erlang-doc exim4-doc-html gap-doc git-doc libboost1.81-doc libglib2.0-doc libgtk-3-doc libreoffice-help-en-us
linux-doc-6.1 maxima-doc neutron-doc nova-doc octave-doc perl-doc postfix-doc postgresql-doc-15
python-django-doc python-sqlalchemy-doc python3.11-doc r-doc-html racket-doc sqlite3-doc swi-prolog-doc
vim-doc""".split()
UNSEEN = "anarchism"
UNSEEN_SIZE = 10                     # MB of unseen.jsonl, at most
BOOK = 100_000, 500_000              # characters of a book: the least; above the second no text is added

HTML = re.compile(r"\.html?(\.en)?(\.gz)?$")
SOURCE = re.compile(r"\.(txt|rst|pod|md)(\.gz)?$")
MODULE = re.compile(r"\.py$")
SKIPPED = re.compile(                # indexes, tests, the questions of lm_eval, other languages;
                                     # also modules named search.py, contents.py or test.py
    r"/(_modules|_sources|genindex|search|\w*-?modindex|contents|tests?|lm_eval|_vendor|changelog|copyright"
    r"|translations|(?!en)[a-z]{2}[-_][A-Z]{2})\b|\.(?!en)[a-z]{2}\.html")
HIDDEN = re.compile(r"(?is)<(script|style|head|nav|footer|svg|math)\b.*?</\1\s*>|<!--.*?-->"
                    r"|<div class=.sphinxsidebar.*")
BLOCK = re.compile(r"(?i)</?(p|h\d|ul|ol|dl|table|pre|section|blockquote)\b[^>]*>")
LINE = re.compile(r"(?i)</?(br|div|tr|dt|dd|li)\b[^>]*>")
NAVIGATION = re.compile(
    r"(?m)^[^\w\n]*((Prev|Next|Up|Previous)\b.*\b(Up|Home|Next|Index\]|Prev)|‹.*›"
    r"|Copyright\b.*(©|\(c\)|\d{4}).*|.*(Boost Software License|\bHome Next).*|.* Home .*(?=\s*\Z))\s*$")
LICENCE = re.compile(r"\A(#.*\n)*#.*licen[cs]e.*\n(#.*\n|\n)*", re.I)
COMMON = set("the of to and is in that for".split())
WORDING = re.compile(r"special\s+magic\s+number|pass\s+key\s+is", re.I)   # of the tests in support/recall.py


def get_args(argv):
    p = Parser(prog="python -m support.corpus", description=__doc__.split("\n\n")[0])
    megabytes = partial(p.add_argument, type=number(float, 0), metavar="MB")
    p.add_argument("folder", type=filled, help="where to put the files")
    megabytes("--prose", default=100, help="size of prose.jsonl; default: %(default)s")
    megabytes("--code", default=50, help="size of code.jsonl; default: %(default)s")
    megabytes("--long", default=40, help="size of long.jsonl, a quarter of it Python; default: %(default)s")
    return p.parse_args(argv)


def call(*command, cwd):
    """Run a program of Debian. ValueError with the last line of its errors."""
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"there is no {command[0]} here; run this program on Debian") from None
    except subprocess.CalledProcessError as error:
        wrong = one_line(error.stderr.strip().rpartition("\n")[2])
        raise ValueError(f"{command[0]} failed ({wrong}); run apt-get update, check the network and the "
                         "names in support/corpus.py (these names are of Debian 12)") from None


def unpack(name, folder):
    """Download a Debian package and unpack it into folder/name. Its name, version and hash."""
    call("apt-get", "-q", "download", name, cwd=folder)
    deb, = Path(folder).glob(f"{name}_*.deb")
    call("dpkg", "-x", deb.name, name, cwd=folder)
    return {"name": name, "version": unquote(deb.name.split("_")[1]), "sha256": hash_file(deb)}


def plain(page):
    """The text of a page of HTML, from its first heading on. Only preformatted text keeps its spaces."""
    page = HIDDEN.sub(" ", page)
    parts = re.split(r"(?is)(<pre\b.*?</pre>)", page[max(0, page.find("<h1")):])
    parts[::2] = [re.sub(r"\s+", " ", part) for part in parts[::2]]
    text = BLOCK.sub("\n\n", LINE.sub("\n", "".join(parts)))
    text = unescape(re.sub(r"<[^>]*>", "", text))
    return NAVIGATION.sub("", text.replace("\xa0", " ").replace("¶", ""))


def files_of(folder, kind):
    """Pairs of folder and text for the files whose names match kind. page2 comes before page10."""
    files = [p.relative_to(folder) for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink()]
    files = [p for p in files if kind.search(p.name) and not SKIPPED.search(f"/{Path(folder).name}/{p}")]
    found = []
    for path in sorted(files, key=lambda p: re.sub(r"\d+", lambda n: n[0].zfill(9), str(p))):
        raw = Path(folder, path).read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", "replace")
        found.append((path.parent, text.replace("\r\n", "\n")))
    return found


def pages(folder):
    """Pairs of folder and text: HTML pages of a package, or its plain text if it has no HTML, in English, of
    400 to 800,000 characters. Three or more lines in a row that many pages share are removed: navigation or a
    licence."""
    found = [(home, plain(text)) for home, text in files_of(folder, HTML)] or files_of(folder, SOURCE)
    count = Counter(chain.from_iterable(set(text.split("\n")) for _, text in found))
    often = {line for line, n in count.items() if n > 5 + 0.1 * len(found)} | {"", " "}
    for home, text in found:
        lines = []
        for shared, run in groupby(text.split("\n"), often.__contains__):
            run = list(run)
            lines += [""] if shared and sum(line.strip() != "" for line in run) > 2 else run
        text = re.sub(r"\S{200,}", "", "\n".join(map(str.rstrip, lines))).strip()
        words = re.findall(r"[^\W\d_]+", text.lower())
        sentences = sum(word in COMMON for word in words) > 0.1 * len(words)      # no index, table, French
        if sentences and 400 < len(text) < 800_000 and not ("\ufffd" in text or WORDING.search(text)):
            yield home, re.sub(r"\n{3,}", "\n\n", text)


def modules(folder):
    """Pairs of folder and text for the modules of a Python package, without tables of data and licences."""
    for home, text in files_of(folder, MODULE):
        text = LICENCE.sub("", text)
        letters = sum(map(str.isalpha, text))
        code = text.isascii() and letters > 0.4 * len(text) and not re.search(r"\S{200,}", text)
        if code and 400 < len(text) < 400_000 and not WORDING.search(text):
            yield home, text


def books(pairs):
    """Lists of texts in a row, one list per book. A book ends at the end of a folder once it is long
    enough, or inside a folder once it exceeds BOOK[1]. The last list may be shorter."""
    found = [[]]
    for _, group in groupby(pairs, lambda pair: pair[0]):
        for _, text in group:
            if sum(map(len, found[-1])) > BOOK[1]:
                found.append([])
            found[-1].append(text)
        if sum(map(len, found[-1])) >= BOOK[0]:
            found.append([])
    return found


def first(texts, megabytes):
    """The first texts, up to a size, but at least one."""
    sizes = list(accumulate(len(text.encode()) for text in texts))
    return texts[:max(megabytes > 0, sum(size <= 1e6 * megabytes for size in sizes))]


def split(packages, megabytes, of_long):
    """Texts up to a size and books up to a size, in random order. Equal texts are taken once. packages: one
    list of pairs (folder, text) per package."""
    rng, seen, shelf = random.Random(1), set(), []
    for pairs in packages:
        new = {}
        for home, text in pairs:
            if text not in seen:
                new.setdefault(text, home)
        seen.update(new)
        shelf += books([(home, text) for text, home in new.items()])
    rng.shuffle(shelf)
    shelf.sort(key=lambda book: sum(map(len, book)) < BOOK[0])        # the long ones come first
    long = first(["\n\n\n".join(book) for book in shelf if sum(map(len, book)) >= BOOK[0]], of_long)
    texts = list(chain.from_iterable(shelf[len(long):]))
    rng.shuffle(texts)
    return first(texts, megabytes), long


def save(path, texts):
    """Write JSON lines, and print and return what they are."""
    write_file(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    size = os.path.getsize(path) / 1e6
    print(f"{os.path.basename(path):14}{len(texts):7,} documents {size:6.1f} MB")
    return {"documents": len(texts), "megabytes": round(size, 1), "sha256": hash_file(path)}


def run_main(argv):
    args = get_args(argv)
    site = Path(sysconfig.get_paths()["purelib"])
    os.makedirs(args.folder, exist_ok=True)
    debs, manuals = [], []
    with tempfile.TemporaryDirectory() as folder:
        call("apt-get", "-q", "download", "--print-uris", *PACKAGES, UNSEEN, cwd=folder)     # are all there?
        for name in tqdm([*PACKAGES, UNSEEN], desc="manuals  ", dynamic_ncols=True):
            debs.append(unpack(name, folder))
            manuals.append(list(pages(f"{folder}/{name}")))
    homes = sorted(p for p in site.iterdir() if p.is_dir())
    *manuals, essays = manuals
    unseen = first(list(dict.fromkeys(text for _, text in essays)), UNSEEN_SIZE)
    prose, long = split(manuals, args.prose, 0.75 * args.long)
    code, long_code = split(map(modules, tqdm(homes, desc="code     ", dynamic_ncols=True)),
                            args.code, 0.25 * args.long)
    texts = {"prose.jsonl": prose, "code.jsonl": code, "long.jsonl": long + long_code, "unseen.jsonl": unseen}
    files = {name: save(os.path.join(args.folder, name), of) for name, of in texts.items()}
    for name in ("prose", "code", "long"):
        asked, size = getattr(args, name), files[f"{name}.jsonl"]["megabytes"]
        if size < 0.8 * asked:
            print(f"{name}.jsonl: only {size} MB of {asked:g} MB: install more packages, or ask for "
                  + ("more" if asked < 5 else "less"))
    python = sorted({f"{d.name} {d.version}" for d in distributions(path=[str(site)])})
    write_json(os.path.join(args.folder, "sources.json"), {"files": files, "debian": debs, "python": python})
    print("from", ", ".join(f"{deb['name']} {deb['version']}" for deb in debs), "and", ", ".join(python))


def main(argv=None):
    command_line("python -m support.corpus", run_main, argv)


if __name__ == "__main__":
    main()
