# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier push`, against a server of this machine in place of the Hub"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from mutations import INDEX, SHARDS, Checkpoint

from cat_modifier.checkpoint.verify import find_damage, write_sums
from cat_modifier.cli import main
from cat_modifier.hub.push import push

REPO = "alice/golden-w4a4"


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a folder by name, without what huggingface_hub notes beside them"""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def download(hub, target: Path, **options) -> dict[str, bytes]:
    snapshot_download(REPO, local_dir=target, endpoint=hub.url, **options)
    return contents(target)


@pytest.fixture
def shards(checkpoint, tmp_path) -> Path:
    """The same checkpoint in two files"""
    folder = tmp_path / "shards"
    Checkpoint(checkpoint).write(folder)
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    write_sums(folder)
    shutil.copyfile(checkpoint / "README.md", folder / "README.md")
    return folder


def test_what_is_downloaded_is_what_was_pushed(hub, checkpoint, tmp_path):
    (checkpoint / ".eval_results").mkdir()
    (checkpoint / ".eval_results" / "one.yaml").write_text("- value: 1\n")
    expected = contents(checkpoint)
    (checkpoint / ".cache" / "huggingface").mkdir(parents=True)
    (checkpoint / ".cache" / "huggingface" / "note").write_text("of a download")
    (checkpoint / ".cat-save.lock").write_text("")
    (checkpoint / ".env").write_text("HF_TOKEN=of a user")
    assert push(checkpoint, REPO) == f"{hub.url}/{REPO}"
    assert hub.repos[REPO].private
    assert len(hub.repos[REPO].branches["main"]) == 2  # the first commit, and this one
    assert download(hub, tmp_path / "downloaded") == expected
    assert not find_damage(tmp_path / "downloaded")


def test_a_second_push_sends_what_is_new(hub, checkpoint):
    push(checkpoint, REPO)
    arrived = hub.uploads.total()
    with (checkpoint / "README.md").open("a") as card:
        card.write("More about it.\n")
    push(checkpoint, REPO)
    assert hub.uploads.total() == arrived
    assert hub.repos[REPO].files("main")["README.md"].endswith(b"More about it.\n")


def test_weights_of_an_older_checkpoint_are_removed_in_the_same_commit(
    hub, checkpoint, shards, tmp_path
):
    push(shards, REPO)
    push(checkpoint, REPO)
    commits = hub.repos[REPO].branches["main"]
    assert {*SHARDS, INDEX} < commits[1].keys()
    assert commits[2].keys() == contents(checkpoint).keys()
    assert len(commits) == 3
    assert download(hub, tmp_path / "downloaded") == contents(checkpoint)


def test_public_and_revision(hub, checkpoint, tmp_path):
    assert push(checkpoint, REPO, is_public=True, revision="w4a4").endswith("/tree/w4a4")
    assert not hub.repos[REPO].private
    assert not hub.repos[REPO].files("main")
    downloaded = download(hub, tmp_path / "downloaded", revision="w4a4", token=False)
    assert downloaded == contents(checkpoint)


def test_a_public_repository_is_not_written_to_unless_asked(hub, checkpoint):
    push(checkpoint, REPO, is_public=True)
    with pytest.raises(ValueError, match=f"{REPO} exists and is public: add --public"):
        push(checkpoint, REPO)
    with pytest.raises(ValueError, match=f"{REPO} exists and is public: add --public"):
        push(checkpoint, REPO.partition("/")[2])  # of the user who is logged in
    assert len(hub.repos[REPO].branches["main"]) == 2
    push(checkpoint, REPO, is_public=True)


@pytest.mark.parametrize(
    "token, repo, message",
    [
        ("", REPO, "You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", REPO, "You are not logged in"),
        ("hf_of_bob", REPO, f"You have no right to write to {REPO}"),
        ("hf_of_alice", "alice/not a name", "'alice/not a name' is no id of a repository"),
        ("hf_of_alice", "a/b/c", "'a/b/c' is no id of a repository"),
    ],
)
def test_who_may_not_push_is_told_in_one_line(
    hub, checkpoint, monkeypatch, token, repo, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(checkpoint / "no-token"))
    with pytest.raises(ValueError) as error:
        push(checkpoint, repo)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not hub.repos and not hub.uploads


def test_a_card_that_the_hub_refuses_makes_no_repository(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: [1, 2]\n---\n")
    with pytest.raises(ValueError, match="refuses the front matter .* must be a string"):
        push(checkpoint, REPO)
    (checkpoint / "README.md").write_text("---\nlicense: 'a\n---\n")
    with pytest.raises(ValueError, match="front matter of README.md cannot be read"):
        push(checkpoint, REPO)
    (checkpoint / "README.md").unlink()
    with pytest.raises(ValueError, match="has no README.md"):
        push(checkpoint, REPO)
    assert not hub.repos


@pytest.mark.parametrize(
    "state", [".cat-save-writing", ".cat-save-finished", ".cat-save-moving"]
)
def test_an_interrupted_save_is_refused(hub, checkpoint, state):
    (checkpoint / state).mkdir()
    with pytest.raises(ValueError, match="was interrupted, or still runs"):
        push(checkpoint, REPO)
    assert not hub.requests


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "SHA256SUMS"])
def test_a_folder_that_is_not_whole_is_refused(hub, checkpoint, file):
    (checkpoint / file).unlink()
    with pytest.raises((OSError, ValueError), match=file):
        push(checkpoint, REPO)
    assert not hub.requests


def test_damaged_weights_are_refused(hub, checkpoint):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is not the file that was saved"):
        push(checkpoint, REPO)
    assert not hub.requests


def test_no_network_is_one_line(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="repeat the command") as error:
        push(checkpoint, REPO)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_upload_that_fails_once_is_repeated(hub, shards, tmp_path):
    hub.failures = 1
    push(shards, REPO)
    assert hub.failures == 0
    assert set(hub.uploads.values()) == {1}
    assert download(hub, tmp_path / "downloaded") == contents(shards)


@pytest.mark.slow
def test_a_killed_push_is_repeated_without_what_arrived(hub, shards, tmp_path):
    """Nothing is to be seen in the repository before all is there"""
    hub.held = (shards / SHARDS[1]).stat().st_size
    command = [sys.executable, "-m", "cat_modifier.cli", "push", str(shards), REPO]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while hub.uploads.total() < 2 and time.monotonic() < deadline:  # a shard, and the tokenizer
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    arrived = dict(hub.uploads)
    assert len(arrived) == 2
    assert not hub.repos[REPO].files("main")

    hub.held = None
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{hub.url}/{REPO}"
    assert hub.uploads.total() == 3
    assert all(hub.uploads[oid] == 1 for oid in arrived)
    assert download(hub, tmp_path / "downloaded") == contents(shards)


def test_the_command_ends_with_one_line(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cat-modifier", "push", str(checkpoint), "bob/theirs"])
    with pytest.raises(SystemExit, match="^error: You have no right to write to bob/theirs"):
        main()
