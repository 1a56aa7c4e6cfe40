from __future__ import annotations

import ctypes
import platform
import sys
from types import SimpleNamespace

import pytest

from bsafusion import cli, memory


def library(answers: dict[int, int], asked: list[tuple[int, int]]) -> SimpleNamespace:
    def mallopt(option: int, value: int) -> int:
        asked.append((option, value))
        return answers[option]

    return SimpleNamespace(mallopt=mallopt)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_glibc_takes_both_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL(None).mallopt
    answers: list[int] = []

    def ask(option: int, value: int) -> int:
        answers.append(real(option, value))
        return answers[-1]

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=ask))
    assert memory.keep_freed_memory()
    assert answers == [1, 1]


def test_blocks_up_to_the_limit_are_kept_and_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for answers, kept in (({-1: 1, -3: 1}, True), ({-1: 1, -3: 0}, False), ({-1: 0, -3: 1}, False)):
        asked: list[tuple[int, int]] = []
        found = library(answers, asked)
        monkeypatch.setattr(memory.ctypes, "CDLL", lambda name, found=found: found)
        assert memory.keep_freed_memory() is kept
        assert asked[0] == (-1, memory.KEPT)
        assert all(value == memory.KEPT for _, value in asked)


def test_other_systems_and_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory.keep_freed_memory() is False
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory.keep_freed_memory() is False


def test_the_command_sets_it_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: order.append("memory"))
    monkeypatch.setattr(cli, "app", lambda prog_name: order.append(prog_name))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # those of the tests' own process stay as they are
    cli.main()
    assert order == ["memory", "bsafusion"]
