//! Time and size, as the kernel gives them and as users write them.
//!
//! Expiry is measured on `CLOCK_BOOTTIME` together with the boot id; the wall clock is only shown.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One reading of both clocks. Given to pure rooms, which have no clock of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// For people: never compared.
    pub wall: jiff::Timestamp,
    /// `CLOCK_BOOTTIME`: runs on in suspend, cannot be set. clock_gettime(2).
    pub boot: Duration,
    /// `/proc/sys/kernel/random/boot_id`: a boottime of another boot means nothing.
    pub boot_id: String,
}

impl Moment {
    /// RFC 3339, UTC, milliseconds.
    pub fn wall_text(&self) -> String {
        timestamp_text(self.wall)
    }
}

/// RFC 3339, UTC, milliseconds.
pub fn timestamp_text(time: jiff::Timestamp) -> String {
    format!("{time:.3}")
}

/// The text is no duration or size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {kind}: {expected}")]
pub struct InvalidQuantity {
    kind: &'static str,
    text: String,
    expected: &'static str,
}

/// A duration as users write it: `90s`, `10m`, `2h`; a bare number is seconds. Never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl Span {
    pub const fn seconds(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }
}

impl FromStr for Span {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let invalid = || InvalidQuantity {
            kind: "duration",
            text: text.to_owned(),
            expected: "a whole number of milliseconds (`ms`), seconds (`s`, or nothing), minutes (`m`), \
                       hours (`h`) or days (`d`), more than zero and at most 365 days",
        };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| invalid())?;
        let milliseconds = match unit {
            "ms" => 1,
            "" | "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(invalid()),
        };
        match number.checked_mul(milliseconds) {
            Some(ms) if ms > 0 && ms <= 365 * 86_400_000 => Ok(Self(Duration::from_millis(ms))),
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        match ms {
            _ if !ms.is_multiple_of(1_000) => write!(f, "{ms}ms"),
            _ if ms.is_multiple_of(3_600_000) => write!(f, "{}h", ms / 3_600_000),
            _ if ms.is_multiple_of(60_000) => write!(f, "{}m", ms / 60_000),
            _ => write!(f, "{}s", ms / 1_000),
        }
    }
}

/// A size as users write it: `64M`, `2G`, `512K`, powers of 1024; a bare number is bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let invalid = || InvalidQuantity {
            kind: "size",
            text: text.to_owned(),
            expected: "a whole number of bytes, or of `K`, `M`, `G`, `T` (powers of 1024), more than zero",
        };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| invalid())?;
        let shift = match unit {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(invalid()),
        };
        match number.checked_mul(1 << shift) {
            Some(bytes) if bytes > 0 => Ok(Self(bytes)),
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

macro_rules! text_or_number {
    ($type:ident, $what:literal) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl serde::de::Visitor<'_> for Visitor {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                        f.write_str($what)
                    }
                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<$type, E> {
                        n.to_string().parse().map_err(E::custom)
                    }
                    fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<$type, E> {
                        n.to_string().parse().map_err(E::custom)
                    }
                }
                d.deserialize_any(Visitor)
            }
        }
    };
}

text_or_number!(Span, "a duration such as \"90s\", \"10m\", \"2h\", or a number of seconds");
text_or_number!(Size, "a size such as \"64M\", or a number of bytes");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_users_write_them() {
        #[track_caller]
        fn check(text: &str, expected: Option<u64>) {
            let ms = text.parse::<Span>().ok().map(|s| s.0.as_millis() as u64);
            assert_eq!(ms, expected, "{text:?}");
        }
        check("90s", Some(90_000));
        check("10m", Some(600_000));
        check("2h", Some(7_200_000));
        check("45", Some(45_000));
        check("250ms", Some(250));
        for bad in ["", "0", "-1", "1.5s", "s", "10 m", "366d", "18446744073709551615h", "5x"] {
            check(bad, None);
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!("64M".parse(), Ok(Size(64 << 20)));
        assert_eq!(Size(2 << 30).to_string(), "2G");
        assert_eq!(Size(1500).to_string(), "1500");
        for bad in ["0", "64MB", "99999999T", "-1", ""] {
            assert!(bad.parse::<Size>().is_err(), "{bad:?}");
        }
    }
}
