"""The state directory and the env file: permissions, locking and damage."""

import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.tests.command_line import Served, command
from polars_cloud_emulator.env_file import read_env_file
from polars_cloud_emulator.testing import running_emulator

Serve = Callable[..., Served]
RunClient = Callable[..., str]

QUERY = """
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
sales = pl.scan_parquet("s3://your-bucket/returns/").select(pl.len())
print(sales.remote(ctx).sink_parquet("s3://your-bucket/mine/").await_result().n_rows_total)
"""
NOBODY = 65534


def refusal(*options: object, **settings: object) -> str:
    """Return the one line with which a start is refused."""
    ran = subprocess.run(
        command("--port-base", 0, *options),
        capture_output=True,
        text=True,
        timeout=60,
        **settings,  # type: ignore[call-overload]
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    [line] = ran.stderr.splitlines()
    return str(line)


def test_second_emulator_in_a_state_directory_is_refused(serve: Serve, tmp_path: Path) -> None:
    state_dir, link = tmp_path / "state", tmp_path / "link"
    link.symlink_to(state_dir)
    first = serve("--port-base", 0, "--state-dir", state_dir)
    expected = f"the state directory {state_dir} is in use by the emulator in process {first.pid} "
    assert expected in refusal("--state-dir", state_dir)
    assert expected in refusal("--state-dir", link)
    with pytest.raises(RuntimeError, match=expected), running_emulator(state_dir=link):
        pass
    assert first.state()["clusters"] == []
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(30)
    with running_emulator(state_dir=link) as second:
        assert str(second.pid) in refusal("--state-dir", state_dir)


def test_unusable_state_directory_is_refused_with_a_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    others = tmp_path / "others"
    others.mkdir()
    if os.geteuid() == 0:
        os.chown(others, NOBODY, -1)
    else:
        others = Path("/")
    for state_dir, expected in {
        file: "File exists",
        file / "below": "Not a directory",
        others: "belongs to another user",
        tmp_path / "a:b": "contains a ':'",
        tmp_path / "a\nb": "contains a character that is not printable",
        tmp_path.joinpath(*["x" * 100] * 5): "is longer than 480 bytes",
    }.items():
        line = refusal("--state-dir", state_dir)
        assert expected in line
        assert ascii(str(state_dir))[1:-1] in line
    assert others.stat().st_mode & stat.S_IROTH


def test_start_on_a_full_disk_is_refused_with_a_clear_error(tmp_path: Path) -> None:
    def fill_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    line = refusal("--state-dir", tmp_path / "state", preexec_fn=fill_disk)
    assert f"the state directory {tmp_path / 'state'} cannot be used: " in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("client-secret", b""),
        ("client-secret", b"\xff\0"),
        ("certificate-authority.key", b""),
        ("trusted-certificates/certificate-authority.pem", b"-----BEGIN"),
        ("state.sqlite", b"no database" * 100),
    ],
)
def test_damaged_file_of_a_state_directory_is_reported(
    serve: Serve, tmp_path: Path, name: str, content: bytes
) -> None:
    state_dir = tmp_path / "state"
    assert serve("--port-base", 0, "--state-dir", state_dir).stop() == (0, "", "")
    (state_dir / name).write_bytes(content)
    line = refusal("--state-dir", state_dir)
    assert f"{state_dir / name}" in line
    assert "damaged" in line
    assert "delete" in line


def test_nobody_else_can_read_the_files_of_an_emulator(
    serve: Serve, run_client: RunClient, tmp_path: Path
) -> None:
    served = serve("--port-base", 0, "--state-dir", tmp_path / "state")
    run_client(served.environment, QUERY)
    files = [tmp_path / "env", tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o700, 0o600}
    assert served.stop() == (0, "", "")


def test_state_directory_and_env_file_may_have_any_printable_name(
    serve: Serve, run_client: RunClient, tmp_path: Path
) -> None:
    folder = tmp_path / 'it\'s "ünï" $HOME ☃'
    folder.mkdir()
    with subprocess.Popen(
        command("--port-base", 0, "--state-dir", folder / "state", "--env-file", "env file"),
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    ) as process:
        try:
            assert process.stdout is not None
            _, _, load = process.stdout.readline().rstrip("\n").partition("in another shell: ")
            shell = subprocess.run(
                ["sh", "-c", f"{load}; env -0"], capture_output=True, check=True, cwd="/"
            )
            loaded = dict(line.split("=", 1) for line in shell.stdout.decode().split("\0") if line)
            assert loaded.items() >= read_env_file(folder / "env file").items()
            assert int(run_client(loaded, QUERY)) == 1
        finally:
            process.terminate()


def test_env_file_replaces_no_file_of_others(serve: Serve, tmp_path: Path) -> None:
    env_file = tmp_path / "env"
    assert serve("--port-base", 0).stop() == (0, "", "")
    assert serve("--port-base", 0).stop() == (0, "", "")
    env_file.write_text("export PATH=/bin\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (env_file, folder, Path("/dev/null")):
        line = refusal("--env-file", path)
        assert f"--env-file: {path} was not written by the emulator" in line
    assert env_file.read_text() == "export PATH=/bin\n"
