//! A disk that loses its cache when the power goes. QEMU logs each write and flush of the guest (its
//! driver `blklogwrites`, in the format of dm-log-writes); afterwards the disk is made anew as it could
//! be: all that came before the last flush, and of the rest any part.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Result;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// QEMU's words for a virtio disk whose writes are logged.
pub fn logged(disk: &Path, log: &Path) -> Result<Vec<String>> {
    File::create(log).map_err(|e| format!("{}: {e}", log.display()))?;
    let node = format!(
        "driver=blklogwrites,node-name=logged,file.driver=file,file.filename={},log.driver=file,log.filename={}",
        disk.display(),
        log.display()
    );
    let words = ["-blockdev", &node, "-device", "virtio-blk-pci,drive=logged,addr=0x10"];
    Ok(words.map(str::to_owned).to_vec())
}

struct Entry {
    at: u64,
    flags: u64,
    data: u64,
    bytes: u64,
}

/// Brings `disk`, as it was before, to a state that it could have now. Returns how many of the last
/// writes, those after the last flush, were kept, and how many lost.
pub fn replay(disk: &Path, log: &Path, mut keep: impl FnMut() -> bool) -> Result<(usize, usize)> {
    let failed = |e: std::io::Error| format!("{}: {e}", log.display());
    let source = File::open(log).map_err(failed)?;
    let target = OpenOptions::new().write(true).open(disk).map_err(failed)?;
    let entries = entries(&source).map_err(failed)?;
    let flushed = entries.iter().rposition(|e| e.flags & FLUSH != 0).unwrap_or(0);
    let (mut kept, mut lost) = (0, 0);
    for (place, entry) in entries.iter().enumerate() {
        if entry.bytes == 0 {
            continue;
        }
        // A write that was told to reach the disk has.
        let certain = place <= flushed || entry.flags & FUA != 0;
        if !certain {
            if keep() {
                kept += 1;
            } else {
                lost += 1;
                continue;
            }
        }
        let mut data = vec![0; entry.bytes as usize];
        if entry.flags & DISCARD == 0 {
            source.read_exact_at(&mut data, entry.data).map_err(failed)?;
        }
        target.write_all_at(&data, entry.at).map_err(failed)?;
    }
    if flushed == 0 {
        return Err("the guest never flushed its disk".to_owned());
    }
    Ok((kept, lost))
}

/// As far as the log goes: what its writer was cut off at is no entry.
fn entries(log: &File) -> std::io::Result<Vec<Entry>> {
    let mut head = [0; 28];
    log.read_exact_at(&mut head, 0)?;
    let word = |bytes: &[u8], nth: usize| {
        u64::from_le_bytes(bytes[nth * 8..nth * 8 + 8].try_into().unwrap_or_default())
    };
    if word(&head, 0) != MAGIC {
        return Err(std::io::Error::other("this is no log of writes"));
    }
    let sector =
        u64::from(u32::from_le_bytes(head[24..28].try_into().unwrap_or_default())).max(512);
    let size = log.metadata()?.len();
    let (mut entries, mut at) = (Vec::new(), sector);
    while at + sector <= size {
        let mut bytes = [0; 32];
        log.read_exact_at(&mut bytes, at)?;
        let (start, count, flags) = (word(&bytes, 0), word(&bytes, 1), word(&bytes, 2));
        let is_empty = start == 0 && count == 0 && flags == 0;
        let has_data = if flags & DISCARD != 0 { 0 } else { count * sector };
        if is_empty || at + sector + has_data > size {
            break;
        }
        entries.push(Entry { at: start * sector, flags, data: at + sector, bytes: count * sector });
        at += sector + has_data;
    }
    Ok(entries)
}
