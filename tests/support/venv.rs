//! Python libraries of the tests, in an environment of their own under `target/`: made once, from the
//! ordinary registry, by pinned versions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::world::finish;

/// The environment with what `tests/identity/requirements.txt` names. Its `bin/python` runs it.
pub fn identity() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let wanted = root.join("tests/identity/requirements.txt");
        let place = root.join("target/identity-venv");
        let stamp = place.join("installed.txt");
        let text = fs::read_to_string(&wanted).unwrap();
        if fs::read_to_string(&stamp).is_ok_and(|installed| installed == text) {
            return place;
        }
        let mut make = Command::new("/usr/bin/python3");
        make.args(["-m", "venv", "--clear"]).arg(&place);
        finish(make, b"", None).ok();
        let mut install = Command::new(place.join("bin/pip"));
        install.args(["install", "--quiet", "--disable-pip-version-check", "--requirement"]);
        finish(
            {
                install.arg(&wanted);
                install
            },
            b"",
            None,
        )
        .ok();
        fs::write(&stamp, text).unwrap();
        place
    })
}

/// A script of `tests/identity`.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/identity").join(name)
}
