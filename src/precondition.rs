// SPDX-License-Identifier: GPL-2.0-only
//! What must hold before a scheduler can be loaded; each miss is one sentence that says what to do.

use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result, bail, ensure};

const SCHED_EXT: &str = "/sys/kernel/sched_ext";
const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// The first kernel with sched_ext.
const OLDEST_KERNEL: (u32, u32) = (6, 12);

// Bit numbers of linux/capability.h.
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Checks this process and the running kernel, the most telling miss first.
pub(crate) fn check() -> Result<()> {
    let status =
        fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status; mount /proc")?;
    ensure!(
        may_load(effective_capabilities(&status)),
        "may not load a BPF scheduler; run it as root, or with CAP_BPF and CAP_PERFMON"
    );
    let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    ensure!(new_enough(&release), "kernel {release} is too old; boot Linux 6.12 or later");
    ensure!(
        Path::new(SCHED_EXT).exists(),
        "kernel has no sched_ext; boot Linux 6.12 or later with CONFIG_SCHED_CLASS_EXT=y, \
         see https://docs.kernel.org/scheduler/sched-ext.html"
    );
    ensure!(
        Path::new(VMLINUX_BTF).exists(),
        "kernel has no type information in {VMLINUX_BTF}; boot one with CONFIG_DEBUG_INFO_BTF=y"
    );
    no_other_scheduler(Path::new(SCHED_EXT))
}

/// The CapEff line of /proc/self/status; nothing at all if it is not there.
fn effective_capabilities(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

fn may_load(capabilities: u64) -> bool {
    let has = |capability: u32| capabilities & 1 << capability != 0;
    has(CAP_SYS_ADMIN) || has(CAP_BPF) && has(CAP_PERFMON)
}

/// Whether a release such as "6.12.107-cloud-amd64" has sched_ext; in doubt it has, and the load decides.
fn new_enough(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) >= OLDEST_KERNEL,
        _ => true,
    }
}

/// Only one scheduler can be loaded at a time.
fn no_other_scheduler(sched_ext: &Path) -> Result<()> {
    let state = read_line(&sched_ext.join("state"))?;
    if state == "disabled" {
        return Ok(());
    }
    match read_line(&sched_ext.join("root/ops")) {
        Ok(name) => {
            bail!("sched_ext scheduler {name} is loaded already (state {state}); stop that one first")
        }
        Err(_) => bail!("another sched_ext scheduler is loaded already (state {state}); stop that one first"),
    }
}

fn read_line(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_may_load_and_others_need_both_capabilities() {
        assert!(may_load(effective_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n")));
        assert!(may_load(1 << CAP_BPF | 1 << CAP_PERFMON));
        assert!(!may_load(1 << CAP_BPF));
        assert!(!may_load(effective_capabilities("CapEff:\t0000000000000000\n")));
        assert!(!may_load(effective_capabilities("")));
    }

    #[test]
    fn releases_are_compared_by_number() {
        for release in ["6.12.107", "6.18.15+deb13-cloud-amd64", "7.0", "10.1.0", "weird"] {
            assert!(new_enough(release), "{release}");
        }
        for release in ["6.9.1", "6.1.0-40-amd64", "5.15.0", "6.11-rc7"] {
            assert!(!new_enough(release), "{release}");
        }
    }

    #[test]
    fn a_loaded_scheduler_is_named() {
        let dir = std::env::temp_dir().join(format!("scx_umcg-test-{}", std::process::id()));
        fs::create_dir_all(dir.join("root")).unwrap();
        fs::write(dir.join("state"), "disabled\n").unwrap();
        assert!(no_other_scheduler(&dir).is_ok());
        fs::write(dir.join("state"), "enabled\n").unwrap();
        fs::write(dir.join("root/ops"), "scx_rusty\n").unwrap();
        let message = no_other_scheduler(&dir).unwrap_err().to_string();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(
            message,
            "sched_ext scheduler scx_rusty is loaded already (state enabled); stop that one first"
        );
    }
}
