//! Where a value could outlive its exec: swap, core files, freed pages; and what keeps it from there.
#![forbid(unsafe_code)]

use std::io;

use rustix::process::{Resource, getrlimit};

use super::{Check, setting};
use crate::sys::probe;

/// The smallest budget that carries the largest value through one exec: the value and its delivery, in
/// whole pages.
const LOCKED_ENOUGH: u64 = 4 << 20;

pub fn examine(is_privileged: bool) -> Vec<Check> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    vec![
        memfd_secret(&probe::memfd_secret()),
        memfd_noexec(&probe::noexec_memfd(), setting("/proc/sys/vm/memfd_noexec").as_deref()),
        locked_memory(is_privileged, getrlimit(Resource::Memlock).current),
        swap(setting("/proc/swaps").as_deref(), is_encrypted),
        core_dumps(setting("/proc/sys/kernel/core_pattern").as_deref()),
        freed_memory(
            setting("/proc/cmdline").as_deref(),
            setting(&format!("/boot/config-{release}")).as_deref(),
        ),
    ]
}

fn memfd_secret(attempt: &io::Result<()>) -> Check {
    const NAME: &str = "memfd_secret";
    match attempt {
        Ok(()) => Check::ok(
            NAME,
            "available",
            "values in sublet's own memory are out of the kernel's reach too",
        ),
        Err(e) => Check::warn(
            NAME,
            format!("refused: {e}"),
            "values in sublet's own memory are locked, undumpable and wiped, as ordinary pages",
            "boot with secretmem.enable=1 (Linux 5.14 to 6.4), or a kernel with CONFIG_SECRETMEM=y",
        ),
    }
}

fn memfd_noexec(attempt: &io::Result<()>, sysctl: Option<&str>) -> Check {
    const NAME: &str = "memfd_noexec";
    let scope = sysctl.unwrap_or("absent");
    match attempt {
        Ok(()) => Check::ok(
            NAME,
            format!("MFD_NOEXEC_SEAL known, vm.memfd_noexec = {scope}"),
            "a memfd delivery can never be executed",
        ),
        Err(e) => Check::warn(
            NAME,
            format!("MFD_NOEXEC_SEAL refused: {e}"),
            "a memfd delivery has mode 0400 and no seal against a later chmod +x",
            "boot Linux 6.3 or newer",
        ),
    }
}

fn locked_memory(is_privileged: bool, limit: Option<u64>) -> Check {
    const NAME: &str = "locked_memory";
    let found = match limit {
        None => "RLIMIT_MEMLOCK unlimited".to_owned(),
        Some(bytes) => format!("RLIMIT_MEMLOCK {} KiB", bytes >> 10),
    };
    match limit {
        Some(bytes) if !is_privileged && bytes < 64 << 10 => Check::fail(
            NAME,
            found,
            "not even one small value can be locked: every lease is denied, delivery_unavailable",
            "raise it to 4096 KiB: ulimit -l, memlock in /etc/security/limits.conf, or LimitMEMLOCK=",
        ),
        Some(bytes) if !is_privileged && bytes < LOCKED_ENOUGH => Check::warn(
            NAME,
            found,
            "large values (up to 1 MiB), or many at once, are denied as delivery_unavailable",
            "raise it to 4096 KiB: ulimit -l, memlock in /etc/security/limits.conf, or LimitMEMLOCK=",
        ),
        _ => Check::ok(NAME, found, "values can be locked into memory"),
    }
}

fn swap(swaps: Option<&str>, is_encrypted: impl Fn(&str) -> bool) -> Check {
    const NAME: &str = "swap";
    const MEND: &str =
        "swapoff -a, use zram, or put swap on dm-crypt with a random key (crypttab: swap)";
    let Some(swaps) = swaps else {
        return Check::warn(
            NAME,
            "unknown: /proc/swaps is not readable",
            "sublet locks its own copies; a copy that the command makes could reach a disk",
            MEND,
        );
    };
    let areas: Vec<&str> =
        swaps.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next()).collect();
    let plain: Vec<&str> = areas
        .iter()
        .copied()
        .filter(|area| !area.starts_with("/dev/zram") && !is_encrypted(area))
        .collect();
    if areas.is_empty() {
        Check::ok(NAME, "none", "no copy of a value reaches a disk through swap")
    } else if plain.is_empty() {
        Check::ok(NAME, areas.join(", "), "in memory or encrypted: no plain copy reaches a disk")
    } else {
        Check::warn(
            NAME,
            format!("{} (not known to be encrypted)", plain.join(", ")),
            "sublet locks its own copies; a copy that the command makes, and a rootless tmpfs, could \
             reach this disk",
            MEND,
        )
    }
}

/// Device mapper says in its uuid what a device is made of.
fn is_encrypted(area: &str) -> bool {
    std::fs::canonicalize(area)
        .ok()
        .and_then(|device| device.file_name()?.to_str().map(str::to_owned))
        .and_then(|device| setting(&format!("/sys/block/{device}/dm/uuid")))
        .is_some_and(|uuid| uuid.starts_with("CRYPT-"))
}

fn core_dumps(pattern: Option<&str>) -> Check {
    const NAME: &str = "core_dumps";
    match pattern {
        Some(pattern) if pattern.starts_with('|') => Check::warn(
            NAME,
            format!("piped to `{}`", pattern[1..].trim()),
            "a piped handler is called whatever RLIMIT_CORE says; sublet empties coredump_filter, so \
             that a core of a leased command holds registers and no memory",
            "for certainty: sysctl -w kernel.core_pattern=core",
        ),
        Some(pattern) => Check::ok(
            NAME,
            format!("written to files named `{pattern}`"),
            "RLIMIT_CORE = 0 is enough, and every exec has it",
        ),
        None => Check::warn(
            NAME,
            "unknown: kernel.core_pattern is not readable",
            "a piped handler would be called whatever RLIMIT_CORE says; sublet empties coredump_filter",
            "mount /proc with /proc/sys",
        ),
    }
}

fn freed_memory(command_line: Option<&str>, build: Option<&str>) -> Check {
    const NAME: &str = "freed_memory";
    let wanted = |key: &str, config: &str| -> Option<bool> {
        let booted = command_line.and_then(|line| {
            let values = line.split_ascii_whitespace().filter_map(|word| word.strip_prefix(key));
            values.filter_map(|value| value.strip_prefix('=')).next_back()
        });
        match booted {
            Some(value) => Some(matches!(value, "1" | "on" | "y" | "true")),
            None => build.map(|text| text.lines().any(|line| line == format!("{config}=y"))),
        }
    };
    let on_free = wanted("init_on_free", "CONFIG_INIT_ON_FREE_DEFAULT_ON");
    let on_alloc = wanted("init_on_alloc", "CONFIG_INIT_ON_ALLOC_DEFAULT_ON");
    let word = |known: Option<bool>| match known {
        Some(true) => "on",
        Some(false) => "off",
        None => "not known",
    };
    let found = format!("init_on_free {}, init_on_alloc {}", word(on_free), word(on_alloc));
    if on_free == Some(true) {
        return Check::ok(NAME, found, "the kernel zeroes every page as its last user goes");
    }
    Check::warn(
        NAME,
        found,
        "sublet wipes its deliveries; a copy that the command made lies in a freed page until the page is \
         used again (readable by root and the kernel alone)",
        "boot with init_on_free=1",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn swap_that_reaches_a_disk_in_the_clear_is_warned_of() {
        #[track_caller]
        fn check(areas: &[&str], status: Status) {
            let lines: String =
                areas.iter().map(|area| format!("{area} partition 1000 0 -2\n")).collect();
            let text = format!("Filename\tType\tSize\tUsed\tPriority\n{lines}");
            let found = swap(Some(&text), |area| area == "/dev/dm-1");
            assert_eq!(found.status, status, "{found:?}");
        }
        check(&[], Status::Ok);
        check(&["/dev/zram0"], Status::Ok);
        check(&["/dev/dm-1"], Status::Ok);
        check(&["/dev/dm-2"], Status::Warn);
        check(&["/dev/zram0", "/swapfile"], Status::Warn);
    }

    #[test]
    fn the_last_word_on_the_command_line_wins_over_the_build() {
        #[track_caller]
        fn check(line: &str, build: Option<&str>, found: &str) {
            assert_eq!(freed_memory(Some(line), build).found, found);
        }
        let built =
            Some("CONFIG_INIT_ON_ALLOC_DEFAULT_ON=y\n# CONFIG_INIT_ON_FREE_DEFAULT_ON is not set");
        check("quiet", None, "init_on_free not known, init_on_alloc not known");
        check("quiet", built, "init_on_free off, init_on_alloc on");
        check("init_on_free=1", None, "init_on_free on, init_on_alloc not known");
        check("init_on_free=1 init_on_free=0", built, "init_on_free off, init_on_alloc on");
        assert_eq!(freed_memory(Some("init_on_free=1"), None).status, Status::Ok);
        assert_eq!(freed_memory(Some(""), None).status, Status::Warn);
    }

    #[test]
    fn locked_memory_is_a_matter_of_size_and_privilege() {
        assert_eq!(locked_memory(true, Some(0)).status, Status::Ok);
        assert_eq!(locked_memory(false, None).status, Status::Ok);
        assert_eq!(locked_memory(false, Some(8 << 20)).status, Status::Ok);
        assert_eq!(locked_memory(false, Some(64 << 10)).status, Status::Warn);
        assert_eq!(locked_memory(false, Some(0)).status, Status::Fail);
    }

    #[test]
    fn a_piped_core_handler_is_named() {
        let piped = core_dumps(Some("|/usr/share/apport/apport -p%p"));
        assert_eq!(piped.status, Status::Warn);
        assert!(piped.found.contains("apport"));
        assert_eq!(core_dumps(Some("core")).status, Status::Ok);
    }
}
