"""What tests of refusals share."""

import pytest


@pytest.fixture
def refuse(cli, tmp_path, monkeypatch):
    """`refuse(code, words, …)`: run in an empty folder; it must fail with that code and one sentence with the words."""
    monkeypatch.chdir(tmp_path)

    def refuse(code, words, *arguments):
        done = cli(*arguments)
        assert done.code == code, done
        assert done.out == "" and "Traceback" not in done.err and "Internal error" not in done.err, done
        box = "Usage: diffaccel" in done.err and "─ Error ─" in done.err
        assert box or (done.err.startswith("Error: ") and done.err.count("\n") == 1), done.err
        for word in [words] if isinstance(words, str) else words:
            assert word in done.err, (word, done.err)
        return done

    return refuse
