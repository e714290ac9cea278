"""Laws of support/corpus.py, without apt-get: the packages are folders that the test makes."""
import json
import subprocess
from pathlib import Path

import pytest

from support import corpus, recall

SENTENCE = "The size of the cache is given in bytes and the name of the page is shown. "
SECRET = recall.TASKS["S2"].needle.format(name="opal", value=12345)


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Stands in for apt-get, dpkg and the installed Python packages. Gives the folder that has them."""
    def run(command, cwd, **options):
        if command[0] == "apt-get":
            Path(cwd, f"{command[-1]}_1%3a2.0-1_all.deb").write_text(command[-1])
        else:
            Path(cwd, command[-1]).symlink_to(tmp_path / command[-1])
    monkeypatch.setattr(corpus.subprocess, "run", run)
    monkeypatch.setattr(corpus, "PACKAGES", ["manual"])
    monkeypatch.setattr(corpus, "UNSEEN", "essays")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"purelib": tmp_path / "site"})
    for i in range(40):
        write(tmp_path / f"manual/usr/doc/page{i}.html", f"<h1>Page {i}</h1><p>{SENTENCE * (20 + i)}</p>")
        write(tmp_path / f"site/lib/module{i}.py", f"def name_{i}():\n    return 'some text'\n" * (20 + i))
    write(tmp_path / "essays/one.txt", 30 * f"{SENTENCE}What a day. ")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def made(folder, *options):
    """What the program makes: the texts of each file."""
    corpus.main([str(folder), *options])
    return {path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()]
            for path in sorted(folder.glob("*.jsonl"))}


def test_same_packages_same_files(debian, tmp_path, capsys):
    """Two runs give the same bytes. sources.json has versions and hashes, and equal texts come once."""
    write(debian / "manual/copy.html", f"<h1>Page 3</h1><p>{SENTENCE * 23}</p>")
    texts = made(tmp_path / "a", "--long", "0")
    numbers = {name: len(of) for name, of in texts.items()}
    assert numbers == {"prose": 40, "code": 40, "long": 0, "unseen": 1}
    made(tmp_path / "b", "--long", "0")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    sources = json.loads((tmp_path / "a/sources.json").read_text())
    assert [deb["version"] for deb in sources["debian"]] == ["1:2.0-1", "1:2.0-1"]
    assert sources["files"]["prose.jsonl"]["sha256"] == corpus.hash_file(tmp_path / "a/prose.jsonl")
    assert "prose.jsonl        40 documents" in capsys.readouterr().out


def test_no_text_is_in_two_files(debian, tmp_path, monkeypatch):
    """Books are long enough and keep the order of their pages, page2 before page10. No other file has their
    pages. Sizes hold."""
    monkeypatch.setattr(corpus, "BOOK", (10_000, 20_000))
    texts = made(tmp_path / "out", "--long", "0.09", "--prose", "0.02")
    manuals = [book for book in texts["long"] if "cache" in book]
    assert len(manuals) == 3 and all(len(book) >= 10_000 for book in texts["long"])
    for book in manuals:
        numbers = [int(n) for n in corpus.re.findall(r"^Page (\d+)$", book, corpus.re.M)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    short = texts["prose"] + texts["code"]
    assert not any(text in book for book in texts["long"] for text in short)
    assert 15_000 < sum(map(len, texts["prose"])) <= 20_000


def test_a_text_that_comes_again_does_not_divide_a_folder(monkeypatch):
    """An equal text in a later folder changes no book."""
    monkeypatch.setattr(corpus, "BOOK", (15, 100))
    a, b, c = ("a" * 10, "b" * 10, "c" * 10)
    pairs = [("one", a), ("one", b), ("one", c), ("two", b)]
    assert corpus.split([pairs], 1, 1) == ([], ["\n\n\n".join((a, b, c))])


@pytest.mark.parametrize("name, text, kept", [
    ("a.html", f"<head>Title</head><p>menu<h1>Title</h1><p>{9 * SENTENCE}<pre>a\n  b</pre>", True),
    ("a.html", f"<h1>Title</h1>{9 * SENTENCE}{SECRET}", False),                  # the tests' wording
    ("a.html", f"<h1>Title</h1>{9 * SENTENCE}The pass\nkey is", False),
    ("a.html", f"<h1>Titre</h1>{20 * 'La taille du cache est en octets. '}", False),
    ("a.html", f"<h1>Index</h1>{99 * '<li>abs, 12</li>'}", False),
    ("a.html", f"<h1>Title</h1>{9 * SENTENCE}\ufffd", False),
    ("de_DE/a.html", f"<h1>Title</h1>{9 * SENTENCE}", False),
    ("genindex.html", f"<h1>Title</h1>{9 * SENTENCE}", False),
    ("a.pod", 9 * SENTENCE, True)])
def test_pages(tmp_path, name, text, kept):
    """English sentences are kept. An index, another language, broken bytes and words of the tests are not."""
    write(tmp_path / name, text)
    found = [text for _, text in corpus.pages(tmp_path)]
    assert len(found) == kept
    if "<pre>" in text:
        assert found == [f"Title\n\n{9 * SENTENCE}".strip() + "\n\na\n  b"]


def test_navigation_is_left_out(tmp_path):
    """Three lines in a row that many pages share are left out. A shared heading stays."""
    for i in range(20):
        write(tmp_path / f"{i}.html", f"<h1>Page {i}</h1><li>Home<li>Help<li>About</li><p>Text {i}</p>"
                                      f"<h2>Use</h2><p>{SENTENCE * (9 + i)}</p><p>Next: x, Up: y [Index]</p>")
    found = [text for _, text in corpus.pages(tmp_path)]
    assert found == [f"Page {i}\n\nText {i}\n\nUse\n\n{SENTENCE * (9 + i)}".strip() for i in range(20)]


@pytest.mark.parametrize("text, kept", [
    ("def f():\n    return 1\n" * 40, True), ("x = 1\n" * 40, False), ("t = (1, 2, 3, 4, 5)\n" * 40, False),
    ("def f():\n    return 1\n" * 40 + f"# {SECRET}", False), ("word = 'é'\n" * 60, False)])
def test_modules(tmp_path, text, kept):
    """Python without tables, other alphabets and words of the tests is kept, all but its licence."""
    write(tmp_path / "lib/module.py", f"# By A. Author\n# License: BSD\n#\n# Some terms\n\n{text}")
    assert [text for _, text in corpus.modules(tmp_path / "lib")] == [text] * kept


@pytest.mark.parametrize("task", recall.TASKS.values())
def test_wording_of_every_test_is_known(task):
    assert corpus.WORDING.search(task.needle) and corpus.WORDING.search(task.question)


@pytest.mark.parametrize("error, line", [
    (FileNotFoundError(), "there is no apt-get here; run this program on Debian"),
    (subprocess.CalledProcessError(100, "", stderr="W: a\nE: no host\n"), "(E: no host); run apt-get up")])
def test_without_apt_or_network(tmp_path, monkeypatch, capsys, error, line):
    """One clear line, exit status 2, and no file."""
    def run(*args, **options):
        raise error
    monkeypatch.setattr(corpus.subprocess, "run", run)
    with pytest.raises(SystemExit) as end:
        corpus.main([str(tmp_path / "out")])
    assert end.value.code == 2 and line in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
