# What one types while working on the project; `.ci/run` does the same from a clean environment.

# an environment for development, with the sources in place
setup:
    python3 -m venv .venv
    .venv/bin/pip install --editable ".[dev]"
    .venv/bin/pre-commit install

# everything, or for instance: just test -m "not slow"
test *arguments:
    .venv/bin/pytest {{arguments}}

lint:
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/codespell

types:
    .venv/bin/pyright

# the pages of docs/ as a site, in build/site
docs:
    .venv/bin/sphinx-build --fail-on-warning --keep-going docs build/site

check: lint types test
