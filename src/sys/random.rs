//! Random numbers of the kernel's. getrandom(2), Linux 3.17.
//!
//! Straight to the kernel: the crate of that name first looks for the function by its name. In a static
//! program there is none to find, and it opens /dev/random instead, which a confined process may not.

use std::io;

/// Fills `bytes`. Waits where the kernel has just begun and has gathered nothing yet.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // SAFETY: the call writes at most as many bytes as the buffer is told to have.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => filled += got,
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}

pub fn random_u32() -> io::Result<u32> {
    let mut bytes = [0; 4];
    fill(&mut bytes)?;
    Ok(u32::from_ne_bytes(bytes))
}

pub fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    fill(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_filled() {
        for len in [0, 1, 300, 70_000] {
            let mut bytes = vec![0; len];
            fill(&mut bytes).unwrap();
            // A long run of zeros does not come by chance.
            assert!(bytes.chunks(32).all(|c| c.len() < 32 || c.iter().any(|b| *b != 0)), "{len}");
        }
        assert_ne!(random_u64().unwrap(), random_u64().unwrap());
    }
}
