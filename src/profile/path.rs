//! Paths as profiles write them. Text goes in, a checked path comes out; nothing is looked up.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};

/// The text is no path that a profile may hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` {why}")]
pub struct InvalidPath {
    text: String,
    why: &'static str,
}

/// An absolute path, or one under the invoker's home directory. Without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub enum HostPath {
    Absolute(PathBuf),
    /// Relative to the invoker's home directory; empty for `~` itself.
    Home(PathBuf),
}

impl HostPath {
    /// The absolute path for an invoker whose home directory is `home`.
    pub fn resolve(&self, home: &Path) -> PathBuf {
        match self {
            HostPath::Absolute(path) => path.clone(),
            HostPath::Home(rest) if rest.as_os_str().is_empty() => home.to_owned(),
            HostPath::Home(rest) => home.join(rest),
        }
    }

    fn is_whole_home(&self) -> bool {
        matches!(self, HostPath::Home(rest) if rest.as_os_str().is_empty())
    }
}

impl FromStr for HostPath {
    type Err = InvalidPath;
    fn from_str(text: &str) -> Result<Self, InvalidPath> {
        let invalid = |why| InvalidPath { text: text.chars().take(200).collect(), why };
        if text.len() > 4095 {
            return Err(invalid("is longer than a path may be (4095 bytes)"));
        }
        if text.chars().any(char::is_control) {
            return Err(invalid("has a control character"));
        }
        let (rest, in_home) = match text.strip_prefix('~') {
            Some("") => ("", true),
            Some(rest) if rest.starts_with('/') => (rest.trim_start_matches('/'), true),
            Some(_) => return Err(invalid("names another user's home; write an absolute path")),
            None => (text, false),
        };
        if !in_home && !rest.starts_with('/') {
            return Err(invalid(
                "is not absolute; a path starts with `/`, or with `~/` for the home",
            ));
        }
        // `Path::components` drops `.` silently, so look at the text.
        if rest.split('/').any(|part| part == ".." || part == ".") {
            return Err(invalid("has a `.` or `..` in it"));
        }
        let path: PathBuf = Path::new(rest).components().collect();
        Ok(if in_home { HostPath::Home(path) } else { HostPath::Absolute(path) })
    }
}

impl TryFrom<String> for HostPath {
    type Error = InvalidPath;
    fn try_from(text: String) -> Result<Self, InvalidPath> {
        text.parse()
    }
}

impl fmt::Display for HostPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPath::Absolute(path) => write!(f, "{}", path.display()),
            HostPath::Home(rest) if rest.as_os_str().is_empty() => f.write_str("~"),
            HostPath::Home(rest) => write!(f, "~/{}", rest.display()),
        }
    }
}

impl Serialize for HostPath {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// One entry of `read_only` or `read_write`: a host path that is seen at the same path inside.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct BindEntry {
    /// Written with a leading `-`, as in systemd: skipped where the host has no such path.
    pub optional: bool,
    pub path: HostPath,
}

/// What the launcher builds itself; the host's own must not show through.
const BUILT: [&str; 2] = ["/proc", "/dev"];

impl FromStr for BindEntry {
    type Err = InvalidPath;
    fn from_str(text: &str) -> Result<Self, InvalidPath> {
        let invalid = |why| InvalidPath { text: text.chars().take(200).collect(), why };
        let (optional, rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let path: HostPath = rest.parse()?;
        if path.is_whole_home() {
            return Err(invalid("would show the whole home directory, its keys included"));
        }
        if let HostPath::Absolute(path) = &path {
            if path.components().all(|c| c == Component::RootDir) {
                return Err(invalid(
                    "would show the whole host; list what is needed, or set `root` to an image",
                ));
            }
            if BUILT.iter().any(|built| path.starts_with(built)) {
                return Err(invalid("is built fresh for each exec and cannot be the host's"));
            }
            if path.starts_with("/run/sublet") || path == Path::new("/tmp") {
                return Err(invalid("is sublet's own place inside a sandbox"));
            }
        }
        Ok(Self { optional, path })
    }
}

impl TryFrom<String> for BindEntry {
    type Error = InvalidPath;
    fn try_from(text: String) -> Result<Self, InvalidPath> {
        text.parse()
    }
}

impl fmt::Display for BindEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.optional { "-" } else { "" }, self.path)
    }
}

impl Serialize for BindEntry {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_absolute_or_under_the_home() {
        #[track_caller]
        fn check(text: &str, expected: Option<(bool, &str)>) {
            let found = text.parse::<BindEntry>().ok();
            let found = found.map(|e| (e.optional, e.path.resolve(Path::new("/home/a"))));
            assert_eq!(found, expected.map(|(o, p)| (o, PathBuf::from(p))), "{text:?}");
        }
        check("/usr", Some((false, "/usr")));
        check("-/usr//lib/", Some((true, "/usr/lib")));
        check("-~/.cargo/bin", Some((true, "/home/a/.cargo/bin")));
        check("~//x", Some((false, "/home/a/x")));
        check("/development", Some((false, "/development")));
        check("/tmp/shared", Some((false, "/tmp/shared")));
        for bad in [
            "",
            "-",
            "usr",
            "./usr",
            "/usr/../etc",
            "/usr/.",
            "~/../bob",
            "~",
            "~/",
            "~bob/x",
            "/",
            "//",
            "/proc",
            "/proc/1",
            "/dev/sda",
            "/run/sublet/bin",
            "/tmp",
            "/a\0b",
            "/a\nb",
            "--/usr",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn the_text_survives() {
        for text in ["/usr", "-/bin", "~/.x", "-~/.cargo/bin"] {
            assert_eq!(text.parse::<BindEntry>().unwrap().to_string(), text);
        }
        assert_eq!("~".parse::<HostPath>().unwrap().to_string(), "~");
    }
}
