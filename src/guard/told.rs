//! Fingerprints as they are told: JSON between the broker and the guard.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::fingerprint::{Fingerprint, Form, GuardKey, SPAN, WINDOW};
use crate::model::name::SecretName;

/// Everything that a guard needs to recognise the managed values of a host. Holds none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// 64 hexadecimal digits.
    pub key: String,
    pub fingerprints: Vec<Print>,
    /// Secrets whose values sublet does not keep (`file` and `command` sources), and so cannot recognise.
    pub unguarded: Vec<SecretName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Print {
    pub secret: SecretName,
    pub form: Form,
    pub span: u32,
    pub window: Option<Window>,
    /// 64 hexadecimal digits.
    pub digest: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub at: u32,
    pub hash: u32,
}

/// What was told is no set of fingerprints.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the broker's fingerprints do not fit: {0}")]
pub struct Misfit(&'static str);

impl Told {
    pub fn new(key: &GuardKey, prints: Vec<Fingerprint>, unguarded: Vec<SecretName>) -> Self {
        let told = |print: Fingerprint| Print {
            secret: print.secret,
            form: print.form,
            span: print.span as u32,
            window: print.window.map(|(at, hash)| Window { at: at as u32, hash }),
            digest: hex(&print.digest),
        };
        Self {
            key: hex(key.bytes()),
            fingerprints: prints.into_iter().map(told).collect(),
            unguarded,
        }
    }

    /// # Errors
    /// [`Misfit`]: then nothing may be taken for clean.
    pub fn into_parts(self) -> Result<(GuardKey, Vec<Fingerprint>, Vec<SecretName>), Misfit> {
        let key = GuardKey::new(unhex(&self.key).ok_or(Misfit("the key"))?);
        let print = |told: Print| {
            let span = told.span as usize;
            let window = told.window.map(|w| (w.at as usize, w.hash));
            let fits = match window {
                Some((at, _)) => span <= SPAN && at + WINDOW <= span,
                None => (1..WINDOW).contains(&span),
            };
            let digest = unhex(&told.digest).filter(|_| fits).ok_or(Misfit("a fingerprint"))?;
            Ok(Fingerprint { secret: told.secret, form: told.form, span, window, digest })
        };
        let prints = self.fingerprints.into_iter().map(print).collect::<Result<_, _>>()?;
        Ok((key, prints, self.unguarded))
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_was_meant_and_nothing_else_is_taken() {
        let key = GuardKey::new([3; 32]);
        let name: SecretName = "s".parse().unwrap();
        let prints = [key.fingerprints(&name, b"0123456789abcdef"), key.fingerprints(&name, b"ab")];
        let prints: Vec<_> = prints.into_iter().flat_map(Result::unwrap).collect();
        let told = Told::new(&key, prints.clone(), vec![name]);
        let text = serde_json::to_string(&told).unwrap();
        let (same, again, _) = serde_json::from_str::<Told>(&text).unwrap().into_parts().unwrap();
        assert_eq!((same.bytes(), again), (key.bytes(), prints));
        let wrong = |change: fn(&mut Told)| {
            let mut told = told.clone();
            change(&mut told);
            told.into_parts().is_err()
        };
        assert!(wrong(|t| t.key.truncate(10)));
        assert!(wrong(|t| t.key.replace_range(0..1, "+")));
        assert!(wrong(|t| t.fingerprints[0].span = 3));
        assert!(wrong(|t| t.fingerprints[0].span = u32::MAX));
        assert!(wrong(|t| t.fingerprints[0].digest.push('0')));
        assert!(wrong(|t| t.fingerprints.last_mut().unwrap().span = 0));
    }
}
