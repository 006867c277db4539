"""Lets `python -m adaptok` do what the command `adaptok` does."""

from adaptok.cli import app

if __name__ == "__main__":
    app(prog_name="adaptok")
