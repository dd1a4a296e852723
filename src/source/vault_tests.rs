use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;

fn name(text: &str) -> SecretName {
    text.parse().unwrap()
}

fn vault() -> (tempfile::TempDir, VaultKey) {
    let dir = tempfile::tempdir().unwrap();
    let key = VaultKey::load_or_create(dir.path(), None).unwrap();
    (dir, key)
}

fn opened(
    key: &VaultKey,
    secret: &str,
    version: u64,
    sealed: &[u8],
) -> Result<Vec<u8>, VaultError> {
    let mut out = vec![0xAA; plaintext_len(&name(secret), sealed)?];
    let result = open_into(key, &name(secret), version, sealed, &mut out);
    if result.is_err() {
        assert!(out.iter().all(|&b| b == 0), "a refused buffer is wiped");
    }
    result.map(|()| out)
}

#[test]
fn a_value_of_any_size_comes_back_and_is_not_in_the_sealed_bytes() {
    let (_dir, key) = vault();
    for len in [0, 1, 31, 4096, MAX_VALUE] {
        let value: Vec<u8> = (0..len).map(|i| (i * 7 + i / 256) as u8).collect();
        let sealed = seal(&key, &name("s"), 1, &Secret::copy_of(&value).unwrap()).unwrap();
        assert_eq!(sealed.len(), len + OVERHEAD);
        assert_eq!(opened(&key, "s", 1, &sealed).unwrap(), value, "{len}");
        if len >= 16 {
            assert!(!sealed.windows(16).any(|window| window == &value[..16]));
        }
    }
    let large = Secret::copy_of(&vec![1; MAX_VALUE + 1]).unwrap();
    assert!(matches!(seal(&key, &name("s"), 1, &large), Err(VaultError::TooLarge { .. })));
}

#[test]
fn one_value_is_never_sealed_alike_twice() {
    let (_dir, key) = vault();
    let value = Secret::copy_of(b"hunter2-hunter2").unwrap();
    let seal = || seal(&key, &name("s"), 1, &value).unwrap();
    assert_ne!(seal()[HEADER..], seal()[HEADER..]);
}

#[test]
fn another_name_version_or_key_and_every_changed_byte_is_refused() {
    let (_dir, key) = vault();
    let value = Secret::copy_of(b"the value").unwrap();
    let sealed = seal(&key, &name("a"), 3, &value).unwrap();
    assert_eq!(opened(&key, "a", 3, &sealed).unwrap(), b"the value");

    assert!(matches!(opened(&key, "b", 3, &sealed), Err(VaultError::Tampered { .. })));
    assert!(matches!(opened(&key, "a", 2, &sealed), Err(VaultError::Tampered { .. })));
    let (_other_dir, other) = vault();
    assert!(matches!(opened(&other, "a", 3, &sealed), Err(VaultError::OtherKey { .. })));

    for at in 0..sealed.len() {
        let mut changed = sealed.clone();
        changed[at] ^= 0x10;
        let refused = opened(&key, "a", 3, &changed).err().unwrap();
        match at {
            0 => assert!(matches!(refused, VaultError::NotSealed { .. }), "{at}"),
            1..=KEY_NAME_SIZE => assert!(matches!(refused, VaultError::OtherKey { .. }), "{at}"),
            _ => assert!(matches!(refused, VaultError::Tampered { .. }), "{at}"),
        }
    }
    for len in [0, 1, OVERHEAD - 1] {
        assert!(matches!(opened(&key, "a", 3, &sealed[..len]), Err(VaultError::NotSealed { .. })));
    }
    let mut short = [0; 3];
    let wrong = open_into(&key, &name("a"), 3, &sealed, &mut short);
    assert!(matches!(wrong, Err(VaultError::WrongBuffer { buffer: 3, value: 9, .. })));
}

#[test]
fn the_key_is_made_once_for_us_alone_and_found_again() {
    let (dir, key) = vault();
    let path = VaultKey::path(dir.path());
    let mode = |p: &Path| std::fs::metadata(p).unwrap().mode() & 0o7777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left");
    let again = VaultKey::load(dir.path(), None).unwrap();
    let sealed = seal(&key, &name("s"), 1, &Secret::copy_of(b"x").unwrap()).unwrap();
    assert_eq!(opened(&again, "s", 1, &sealed).unwrap(), b"x");
    // What is derived is not the file itself.
    assert_ne!(std::fs::read(&path).unwrap(), &key.derived.expose()[..KEY_SIZE]);

    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(VaultKey::load(empty.path(), None), Err(VaultError::NoKey { .. })));
    assert!(!empty.path().join("keys").exists(), "looking makes nothing");
}

#[test]
fn of_many_who_make_the_key_at_once_all_get_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<_> = std::thread::scope(|scope| {
        let make = || VaultKey::load_or_create(dir.path(), None).unwrap().name;
        let makers: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
        makers.into_iter().map(|maker| maker.join().unwrap()).collect()
    });
    assert!(names.iter().all(|name| *name == names[0]));
}

#[test]
fn a_key_that_others_could_use_is_refused() {
    #[track_caller]
    fn check(spoil: impl Fn(&Path), usable: bool) {
        let (dir, _) = vault();
        spoil(&VaultKey::path(dir.path()));
        match VaultKey::load(dir.path(), None) {
            Ok(_) => assert!(usable),
            Err(e) => assert!(!usable && matches!(e, VaultError::UnsafeKey { .. }), "{e:?}"),
        }
    }
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    check(|_| {}, true);
    check(|key| mode(key, 0o400), true);
    for bad in [0o640, 0o604, 0o660, 0o602] {
        check(|key| mode(key, bad), false);
    }
    check(|key| mode(key.parent().unwrap(), 0o770), false);
    check(|key| std::fs::write(key, [0; 31]).unwrap(), false);
    check(|key| std::fs::write(key, [0; 33]).unwrap(), false);
    check(|key| std::fs::write(key, []).unwrap(), false);
    check(
        |key| {
            std::fs::rename(key, key.with_extension("moved")).unwrap();
            symlink(key.with_extension("moved"), key).unwrap();
        },
        false,
    );
    check(
        |key| {
            std::fs::remove_file(key).unwrap();
            nix::unistd::mkfifo(key, nix::sys::stat::Mode::S_IRUSR).unwrap();
        },
        false,
    );
    if rustix::process::geteuid().is_root() {
        check(|key| std::os::unix::fs::chown(key, Some(12345), None).unwrap(), false);
        check(|key| std::os::unix::fs::chown(key, Some(0), None).unwrap(), true);
    }
}

#[test]
fn a_credential_of_systemd_comes_before_the_file() {
    let (dir, file_key) = vault();
    let credentials = tempfile::tempdir().unwrap();
    let load = || VaultKey::load(dir.path(), Some(credentials.path()));
    assert_eq!(load().unwrap().name, file_key.name, "no such credential");

    let path = credentials.path().join(CREDENTIAL);
    std::fs::write(&path, [7; KEY_SIZE]).unwrap();
    let mode =
        |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    for good in [0o400, 0o440] {
        mode(good);
        assert_ne!(load().unwrap().name, file_key.name);
    }
    for bad in [0o444, 0o460] {
        mode(bad);
        assert!(matches!(load(), Err(VaultError::UnsafeKey { .. })), "{bad:o}");
    }
}

#[test]
fn a_digest_tells_equal_values_under_one_key_only() {
    let (_dir, key) = vault();
    let (_other_dir, other) = vault();
    assert_eq!(key.digest(b"value"), key.digest(b"value"));
    assert_ne!(key.digest(b"value"), key.digest(b"valuf"));
    assert_ne!(key.digest(b"value"), other.digest(b"value"));
    assert_ne!(key.digest(b""), key.digest(b"\0"));
}

#[test]
fn the_mac_is_the_standard_one() {
    // RFC 4231, test case 2.
    let mut out = [0; 32];
    mac(b"Jefe", &[b"what do ya want ", b"for nothing?"], &mut out);
    let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

const MASK: u8 = 0x5A;

/// How many times the value that is `masked` lies in the clear in this process's memory.
fn copies_in_memory(masked: &[u8]) -> usize {
    use std::os::unix::fs::FileExt;
    let memory = File::open("/proc/self/mem").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut copies = 0;
    let mut buffer = vec![0; 1 << 12];
    let zeros = buffer.clone();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).unwrap().starts_with("rw")) {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let mut at = u64::from_str_radix(start, 16).unwrap();
        let end = u64::from_str_radix(end, 16).unwrap();
        while at < end {
            let want = buffer.len().min((end - at) as usize);
            // Guard pages and secret memory cannot be read so, and hold what they should.
            let Ok(got) = memory.read_at(&mut buffer[..want], at) else { break };
            // A comparison of slices is fast without optimisation, and most of memory is empty.
            if buffer[..got] != zeros[..got] {
                let starts = (0..got).filter(|&i| buffer[i] == masked[0] ^ MASK);
                copies += starts
                    .filter(|&i| i + masked.len() <= got)
                    .filter(|&i| buffer[i..].iter().zip(masked).all(|(a, b)| a ^ MASK == *b))
                    .count();
            }
            buffer.fill(0);
            if got < masked.len() {
                break;
            }
            // Windows overlap, so that none is missed between two reads.
            at +=
                if (got as u64) < end - at { (got - masked.len() + 1) as u64 } else { got as u64 };
        }
    }
    copies
}

#[test]
fn no_copy_of_a_value_stays_behind() {
    let (_dir, key) = vault();
    for len in [40, 64, 5000] {
        let mut masked = vec![0; len];
        crate::sys::random::fill(&mut masked).unwrap();
        let mut value = Secret::zeroed(len).unwrap();
        for (byte, masked) in value.expose_mut().iter_mut().zip(&masked) {
            *byte = masked ^ MASK;
        }
        let digest = key.digest(value.expose());
        let sealed = seal(&key, &name("s"), 1, &value).unwrap();
        let mut out = Secret::zeroed(len).unwrap();
        open_into(&key, &name("s"), 1, &sealed, out.expose_mut()).unwrap();
        assert!(out.expose() == value.expose() && key.digest(out.expose()) == digest);
        // Of a block that was hashed, 24 bytes are as good as all.
        let plain = value.expose().to_vec();
        drop((value, out));
        let begin = &masked[..24];
        let end = &masked[len - 24..];
        assert!(copies_in_memory(begin) >= 1 && copies_in_memory(end) >= 1, "the control");
        let mut plain = plain;
        plain.zeroize();
        assert_eq!((copies_in_memory(begin), copies_in_memory(end)), (0, 0), "{len} bytes");
    }
}
