# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.mongodb_version import FilterModule, mongodb_version

XEON = "flags\t\t: fpu vme de pse tsc msr sse sse2 ssse3 fma sse4_1 sse4_2 avx f16c rdrand avx2 avx512f"
KVM64 = "flags\t\t: fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat clflush mmx fxsr sse sse2 syscall nx lm"
NEOVERSE_N1 = "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
CORTEX_A72 = "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
# 8.1: it has the atomic instructions, and MongoDB 5.0 still does not run
THUNDERX2 = "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics cpuid asimdrdm"


@pytest.mark.parametrize(
    ("cpu", "architecture", "release"),
    [
        (XEON, "x86_64", "5.0.32"),
        (XEON, "amd64", "5.0.32"),
        (KVM64, "x86_64", "4.4.29"),
        (NEOVERSE_N1, "aarch64", "5.0.32"),
        (NEOVERSE_N1, "arm64", "5.0.32"),
        (CORTEX_A72, "aarch64", "4.4.18"),
        (THUNDERX2, "aarch64", "4.4.18"),
    ],
)
def test_release_of_a_cpu(cpu: str, architecture: str, release: str) -> None:
    assert mongodb_version(cpu, architecture) == release


@pytest.mark.parametrize("flag", ["avx2", "avx512f", "noavx", "avx_vnni"])
def test_only_the_flag_itself_counts(flag: str) -> None:
    assert mongodb_version(f"flags : fpu {flag} lm", "x86_64") == "4.4.29"


def test_the_whole_file_is_read_too() -> None:
    text = f"processor\t: 0\nmodel name\t: An avx CPU\n{KVM64}\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\n{KVM64}\n"
    assert mongodb_version(text, "x86_64") == "4.4.29"
    assert mongodb_version(text.replace("lm", "lm avx"), "x86_64") == "5.0.32"


def test_releases_can_be_given() -> None:
    assert mongodb_version(XEON, "x86_64", "5.0.31", "4.4.28", "4.4.17") == "5.0.31"
    assert mongodb_version(KVM64, "x86_64", modern="5.0.31", legacy="4.4.28") == "4.4.28"
    assert mongodb_version(CORTEX_A72, "aarch64", legacy_arm="4.4.17") == "4.4.17"


@pytest.mark.parametrize("text", ["", "processor : 0\n", "flags :", "avx"])
def test_an_unknown_cpu_is_not_guessed(text: str) -> None:
    with pytest.raises(AnsibleFilterError, match="mongodb_image"):
        mongodb_version(text, "x86_64")


def test_another_architecture_is_refused() -> None:
    with pytest.raises(AnsibleFilterError, match="riscv64"):
        mongodb_version(XEON, "riscv64")


def test_filter_is_registered() -> None:
    assert FilterModule().filters() == {"mongodb_version": mongodb_version}
