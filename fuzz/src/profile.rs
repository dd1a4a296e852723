//! Profiles, `extends` included. The parts of an input: the profile, then those that it may extend as
//! `p1`, `p2`, …; the built-in ones are there too.
#![forbid(unsafe_code)]

use sublet::config::Located;
use sublet::model::name::Channel;
use sublet::profile::names::{self, NameClass};
use sublet::profile::{self, HostPath, LoadError, NetworkMode, Place, Profile, ProfileError};

use super::feed::parts;

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut loads = 0;
    let mut load = |name: &str| -> Result<String, LoadError> {
        loads += 1;
        let number = name.strip_prefix('p').and_then(|n| n.parse::<usize>().ok());
        match number.and_then(|n| parts(text).nth(n)) {
            Some(part) => Ok(part.to_owned()),
            None => profile::load_builtin(name),
        }
    };
    let own = parts(text).next().unwrap_or_default();
    match profile::resolve("p0", own, &mut load) {
        Ok(profile) => {
            check(&profile);
            comes_back(&profile);
        }
        Err(e) => {
            let (ProfileError::Invalid(at)
            | ProfileError::Extends { at, .. }
            | ProfileError::Chain { at }) = &e;
            assert!(!e.to_string().is_empty());
            check_place(at, text);
        }
    }
    assert!(loads < profile::MAX_DEPTH, "{loads} texts were loaded");
}

/// An error points into the text and shows a piece of it that a terminal can take.
pub fn check_place(at: &Located, all: &str) {
    assert!(at.line >= 1 && at.column >= 1);
    assert!(at.line <= all.matches('\n').count().max(1) + 40, "{at:?}");
    assert!(at.excerpt.chars().count() <= 122, "{at:?}");
    assert!(!at.excerpt.contains(char::is_control), "{at:?}");
}

/// What everyone downstream relies on.
pub fn check(profile: &Profile) {
    assert!(profile.network.mode != NetworkMode::Audience, "there is no proxy");
    assert!(!profile.environment.path.is_empty());
    for (name, value) in &profile.environment.set {
        assert!(settable(name.as_str(), true), "{name} is set");
        assert!(!value.contains('\0'));
    }
    for name in &profile.environment.pass {
        assert!(settable(name.as_str(), false), "{name} is passed");
    }
    if let Some(root) = &profile.filesystem.root {
        assert!(matches!(root, HostPath::Absolute(_)));
    }
    let entries: Vec<_> =
        profile.filesystem.read_only.iter().chain(&profile.filesystem.read_write).collect();
    let home = std::path::Path::new("/home/someone");
    for (nth, entry) in entries.iter().enumerate() {
        assert!(entries[..nth].iter().all(|e| e.path != entry.path), "{entry} twice");
        let path = entry.path.resolve(home);
        assert!(path.is_absolute() && path.parent().is_some() && path != home, "{entry}");
        let parts: Vec<_> = path.components().collect();
        assert!(!parts.contains(&std::path::Component::ParentDir), "{entry}");
        for own in ["/proc", "/dev", "/run/sublet"] {
            assert!(!path.starts_with(own), "{entry}");
        }
    }
    for (nth, capability) in profile.capabilities.iter().enumerate() {
        assert!(profile.capabilities[..nth].iter().all(|c| c.name != capability.name));
        assert!(!capability.channels.is_empty());
        assert!(!capability.command.is_empty());
        assert!(!capability.audiences.is_empty());
        for audience in &capability.audiences {
            let same = capability.audiences.iter().filter(|a| a.host == audience.host);
            assert_eq!(same.count(), 1);
            for &channel in &capability.channels {
                let place = audience.place(channel).expect("every declared channel has a place");
                check_delivery(&place, profile);
                if channel == Channel::Git {
                    assert!(audience.protocol.as_ref().is_some_and(|p| p.is_http()));
                }
            }
        }
    }
}

/// A delivery takes no name that is another's, and its file stays in the directory of deliveries.
fn check_delivery(place: &Place, profile: &Profile) {
    if let Place::File { name, path, .. } = place {
        assert_eq!(path.parent(), Some(std::path::Path::new("/run/sublet/secrets")));
        assert_eq!(path.file_name(), Some(std::ffi::OsStr::new(name.as_str())));
    }
    let Some(variable) = place.variable() else { return };
    let class = names::class(variable.as_str());
    assert!(matches!(class, NameClass::Free | NameClass::OnlyByLease), "{variable} is delivered");
    assert!(!profile.environment.set.contains_key(variable), "{variable} is set and delivered");
    assert!(!profile.environment.pass.contains(variable), "{variable} is passed and delivered");
}

fn settable(name: &str, by_set: bool) -> bool {
    match names::class(name) {
        NameClass::Free | NameClass::Git => true,
        NameClass::Loader => by_set,
        NameClass::Reserved
        | NameClass::Refused
        | NameClass::OnlyByLease
        | NameClass::OfProfile => false,
    }
}

/// What `sublet profile show` prints is the same profile.
fn comes_back(profile: &Profile) {
    let text = toml::to_string(profile).expect("a profile is TOML");
    let again = profile::resolve("p0", &text, &mut |name| {
        panic!("a resolved profile extends {name}:\n{text}")
    });
    match again {
        Ok(again) => assert_eq!(&again, profile, "{text}"),
        Err(e) => panic!("{e}\n{text}"),
    }
}
