//! An initramfs: files in the newc format of cpio, as the kernel unpacks it
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// Bytes that the kernel unpacks into its first root. Archives may follow each other.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub fn directory(&mut self, name: &str) -> &mut Self {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[])
    }

    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> &mut Self {
        self.entry(name, REGULAR | mode, (0, 0), content)
    }

    pub fn character(&mut self, name: &str, major: u32, minor: u32) -> &mut Self {
        self.entry(name, CHARACTER | 0o600, (major, minor), &[])
    }

    /// A host's directory, with what is below, as root's.
    pub fn tree(&mut self, name: &str, dir: &Path) -> super::Result<&mut Self> {
        let failed = |e| format!("cannot pack {}: {e}", dir.display());
        let mode = fs::metadata(dir).map_err(failed)?.permissions().mode() & 0o7777;
        self.entry(name, DIRECTORY | mode, (0, 0), &[]);
        let mut entries: Vec<_> =
            fs::read_dir(dir).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let inner = format!("{name}/{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() {
                self.tree(&inner, &entry.path())?;
            } else if kind.is_file() {
                let mode = entry.metadata().map_err(failed)?.permissions().mode() & 0o7777;
                self.file(&inner, mode, &fs::read(entry.path()).map_err(failed)?);
            }
        }
        Ok(self)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> &mut Self {
        self.entries += 1;
        let inode = self.entries;
        // Fields: inode, mode, uid, gid, links, mtime, size, device (2), its own device (2), name, check.
        let size = content.len() as u32;
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1];
        self.bytes.extend_from_slice(b"070701");
        for field in fields.into_iter().chain([name.len() as u32 + 1, 0]) {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}
