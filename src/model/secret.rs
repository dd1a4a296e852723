//! A value in locked memory. No `Debug`, `Clone`, `Display` or `Serialize`: what cannot be written
//! cannot leak by accident.
#![forbid(unsafe_code)]

use std::io::{self, Read};

use crate::sys::locked::LockedRegion;

/// The largest value that any channel carries.
pub const MAX_VALUE: usize = 1 << 20;

/// The bytes of one value, wiped on drop.
pub struct Secret {
    region: LockedRegion,
    len: usize,
}

impl Secret {
    /// `len` zeroed bytes to be written through [`Secret::expose_mut`].
    pub fn zeroed(len: usize) -> io::Result<Self> {
        Ok(Self { region: LockedRegion::new(len)?, len })
    }

    /// Copies `bytes`; the caller wipes its own copy.
    pub fn copy_of(bytes: &[u8]) -> io::Result<Self> {
        let mut secret = Self::zeroed(bytes.len())?;
        secret.expose_mut().copy_from_slice(bytes);
        Ok(secret)
    }

    /// Reads to the end straight into locked memory, without a buffer between.
    ///
    /// # Errors
    /// `FileTooLarge` past [`MAX_VALUE`], else what the reader or the lock budget says.
    pub fn read_from(mut reader: impl Read) -> io::Result<Self> {
        let mut growing = Growing::new()?;
        while growing.read_once(&mut reader)? {}
        Ok(growing.into_secret())
    }

    pub fn expose(&self) -> &[u8] {
        &self.region.bytes()[..self.len]
    }

    pub fn expose_mut(&mut self) -> &mut [u8] {
        &mut self.region.bytes_mut()[..self.len]
    }

    /// Forgets what lies beyond `len`, and wipes it.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            zeroize::Zeroize::zeroize(&mut self.region.bytes_mut()[len..self.len]);
            self.len = len;
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A value that is being read, piece by piece.
pub struct Growing(Secret);

impl Growing {
    pub fn new() -> io::Result<Self> {
        let mut secret = Secret::zeroed(4096)?;
        secret.len = 0;
        Ok(Self(secret))
    }

    /// Reads once, into memory that grows as needed. False at the end.
    ///
    /// # Errors
    /// As [`Secret::read_from`].
    pub fn read_once(&mut self, reader: &mut impl Read) -> io::Result<bool> {
        let secret = &mut self.0;
        if secret.len == secret.region.bytes().len() {
            if secret.len > MAX_VALUE {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let mut larger = Secret::zeroed(secret.len * 4)?;
            larger.region.bytes_mut()[..secret.len].copy_from_slice(secret.expose());
            larger.len = secret.len;
            *secret = larger;
        }
        match reader.read(&mut secret.region.bytes_mut()[secret.len..]) {
            Ok(0) if secret.len > MAX_VALUE => Err(io::ErrorKind::FileTooLarge.into()),
            Ok(0) => Ok(false),
            Ok(n) => {
                secret.len += n;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(e) => Err(e),
        }
    }

    pub fn into_secret(self) -> Secret {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_exactly_and_refuses_what_is_too_large() {
        for len in [0, 1, 4095, 4096, 4097, 70_000, MAX_VALUE] {
            let value: Vec<u8> = (0..len).map(|i| i as u8).collect();
            assert_eq!(Secret::read_from(&value[..]).unwrap().expose(), &value[..], "{len}");
        }
        let big = vec![1; MAX_VALUE + 1];
        assert_eq!(Secret::read_from(&big[..]).err().unwrap().kind(), io::ErrorKind::FileTooLarge);
    }
}
