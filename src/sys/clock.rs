//! The clock that leases are measured on. clock_gettime(2); random(4) for the boot id.

use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Time since boot, suspend included: `CLOCK_BOOTTIME`.
pub fn boottime() -> Duration {
    let t = clock_gettime(ClockId::Boottime);
    Duration::new(t.tv_sec.unsigned_abs(), t.tv_nsec.unsigned_abs() as u32)
}

/// The boot that [`boottime`] counts from.
///
/// # Errors
/// If the boot id cannot be read, or if this process lives in a time namespace with an offset
/// (time_namespaces(7)): its boottime could then not be compared with the one that others recorded.
///
/// Read once: neither changes while a process lives, and a broker that has given up the file system
/// could not read them again.
pub fn boot_id() -> io::Result<String> {
    static FOUND: OnceLock<String> = OnceLock::new();
    if let Some(boot_id) = FOUND.get() {
        return Ok(boot_id.clone());
    }
    refuse_time_offset()?;
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(FOUND.get_or_init(|| boot_id.trim_end().to_owned()).clone())
}

fn refuse_time_offset() -> io::Result<()> {
    let offsets = match std::fs::read_to_string("/proc/self/timens_offsets") {
        Ok(text) => text,
        // Before Linux 5.6 there are no time namespaces to be shifted by.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let shifted = offsets.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.next() == Some("boottime") && words.any(|w| w != "0")
    });
    if shifted {
        return Err(io::Error::other(
            "this process runs in a time namespace with a boottime offset (/proc/self/timens_offsets), \
             so lease expiry could not be trusted",
        ));
    }
    Ok(())
}
