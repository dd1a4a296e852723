//! A keyed digest of a managed value: says that a value is a managed one, and never which bytes it has.
//! The key lives with the vault; here is only the comparison.
#![forbid(unsafe_code)]

use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::model::name::SecretName;

/// HMAC-SHA256 (RFC 2104) of a value under the vault's digest key. Without that key it tells nothing
/// about the value, however short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueDigest(pub [u8; 32]);

/// The managed secret that has this digest, if there is one. Takes the same time wherever in `managed`
/// the match is and however much of it agrees.
pub fn matching<'a>(
    digest: &ValueDigest,
    managed: &'a [(SecretName, ValueDigest)],
) -> Option<&'a SecretName> {
    let mut at = 0u64;
    let mut found = Choice::from(0);
    for (i, (_, candidate)) in managed.iter().enumerate() {
        let equal = candidate.0.ct_eq(&digest.0);
        at.conditional_assign(&(i as u64), equal);
        found |= equal;
    }
    if bool::from(found) { managed.get(at as usize).map(|(name, _)| name) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_secret_that_matches_and_none_else() {
        let managed: Vec<(SecretName, ValueDigest)> =
            (0..3u8).map(|i| (format!("s{i}").parse().unwrap(), ValueDigest([i; 32]))).collect();
        #[track_caller]
        fn check(managed: &[(SecretName, ValueDigest)], byte: u8, expected: Option<&str>) {
            let mut digest = ValueDigest([byte; 32]);
            assert_eq!(matching(&digest, managed).map(SecretName::as_str), expected);
            digest.0[31] ^= 0x80;
            assert_eq!(matching(&digest, managed), None);
        }
        check(&managed, 0, Some("s0"));
        check(&managed, 2, Some("s2"));
        check(&managed, 9, None);
        check(&[], 0, None);
    }
}
