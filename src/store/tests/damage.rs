//! Files that are not as sublet left them: damaged, replaced, open to others, of a later version.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;

fn filled() -> tempfile::TempDir {
    let dir = state();
    let mut store = Store::open(dir.path()).unwrap();
    write(&mut store, |tx| {
        (0..200).try_for_each(|_| tx.append(draft(EventType::ExecStarted)).map(drop))
    });
    assert!(store.tidy().unwrap(), "all pages are in the database");
    dir
}

/// Opens and uses all of it: what damage must not survive.
fn use_it(dir: &Path) -> Result<(), StoreError> {
    let mut store = Store::open(dir)?;
    store.transaction(Durability::Durable, |tx| {
        tx.append(draft(EventType::RunStarted))?;
        tx.events().try_for_each(|event| event.map(drop))
    })?;
    Ok(())
}

#[test]
fn damage_is_named_as_such() {
    #[track_caller]
    fn check(damage: impl Fn(&Path), usable: bool) {
        let dir = filled();
        let db = dir.path().join("db/sublet.db");
        fs::remove_file(dir.path().join("db/sublet.db-wal")).unwrap();
        fs::remove_file(dir.path().join("db/sublet.db-shm")).unwrap();
        damage(&db);
        match use_it(dir.path()) {
            Ok(()) => assert!(usable),
            Err(StoreError::Corrupt { path, .. }) => {
                assert!(!usable && path.ends_with("sublet.db"))
            }
            Err(e) => panic!("{e:?}"),
        }
    }
    let overwrite = |db: &Path, offset: u64, len: usize| {
        let file = fs::OpenOptions::new().write(true).open(db).unwrap();
        file.write_all_at(&vec![0xA5; len], offset).unwrap();
    };
    let truncate = |db: &Path, len: u64| {
        fs::OpenOptions::new().write(true).open(db).unwrap().set_len(len).unwrap();
    };
    check(|_| {}, true);
    check(|db| overwrite(db, 0, 100), false);
    check(|db| overwrite(db, 100, 3900), false);
    // The trail's own pages, one after another.
    check(|db| (12..20).for_each(|page| overwrite(db, page * 4096, 4096)), false);
    check(|db| truncate(db, 0), false);
    check(|db| truncate(db, 10), false);
    check(|db| truncate(db, 5 * 4096), false);
    check(
        |db| fs::write(db, "not a database, but quite long enough to be one ".repeat(200)).unwrap(),
        false,
    );
    check(
        |db| {
            fs::remove_file(db).unwrap();
            rusqlite::Connection::open(db).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
        },
        false,
    );
    check(
        |db| {
            let conn = rusqlite::Connection::open(db).unwrap();
            conn.execute_batch("DROP TABLE event").unwrap();
        },
        false,
    );
}

#[test]
fn a_database_that_is_gone_from_beside_its_log_is_not_made_anew() {
    let dir = filled();
    fs::remove_file(dir.path().join("db/sublet.db")).unwrap();
    assert!(matches!(use_it(dir.path()), Err(StoreError::Corrupt { .. })));
    assert!(matches!(Reader::open(dir.path()), Err(StoreError::NotFound { .. })));
    fs::remove_dir_all(dir.path().join("db")).unwrap();
    use_it(dir.path()).unwrap();
}

#[test]
fn a_file_that_is_removed_or_replaced_while_open_stops_grants() {
    #[track_caller]
    fn check(damage: impl Fn(&Path), usable: bool) {
        let dir = filled();
        let mut store = Store::open(dir.path()).unwrap();
        damage(&dir.path().join("db"));
        for _ in 0..2 {
            let result = store
                .transaction(Durability::Durable, |tx| tx.append(draft(EventType::LeaseGranted)));
            match result {
                Ok(_) => assert!(usable),
                Err(e) => assert!(!usable && matches!(e, StoreError::Lost { .. }), "{e:?}"),
            }
        }
    }
    let replace = |path: PathBuf| {
        let copy = path.with_extension("copy");
        fs::copy(&path, &copy).unwrap();
        fs::rename(copy, path).unwrap();
    };
    check(|_| {}, true);
    check(|db| fs::write(db.join("unrelated"), "").unwrap(), true);
    check(|db| fs::remove_file(db.join("sublet.db")).unwrap(), false);
    check(|db| fs::remove_file(db.join("sublet.db-wal")).unwrap(), false);
    check(|db| replace(db.join("sublet.db")), false);
    check(|db| replace(db.join("sublet.db-wal")), false);
    check(|db| replace(db.join("sublet.db-shm")), false);
    check(|db| fs::rename(db, db.with_extension("moved")).unwrap(), false);
}

/// Who is told that nothing is granted must not find it granted when the file is put back.
#[test]
fn what_was_refused_is_not_in_a_file_that_is_put_back() {
    let dir = filled();
    let (db, away) = (dir.path().join("db/sublet.db"), dir.path().join("db/away"));
    let mut store = Store::open(dir.path()).unwrap();
    let before = store.read(|view| view.head()).unwrap();
    fs::rename(&db, &away).unwrap();
    let refused =
        store.transaction(Durability::Durable, |tx| tx.append(draft(EventType::LeaseGranted)));
    assert!(matches!(refused, Err(StoreError::Lost { .. })), "{refused:?}");
    drop(store);
    fs::rename(&away, &db).unwrap();
    assert_eq!(Store::open(dir.path()).unwrap().read(|view| view.head()).unwrap(), before);
}

#[test]
fn a_later_schema_is_left_alone() {
    let dir = filled();
    let conn = rusqlite::Connection::open(dir.path().join("db/sublet.db")).unwrap();
    conn.pragma_update(None, "user_version", schema::VERSION + 1).unwrap();
    drop(conn);
    assert!(matches!(use_it(dir.path()), Err(StoreError::Newer { found: 4, known: 3, .. })));
    assert!(matches!(Reader::open(dir.path()), Err(StoreError::Newer { .. })));
}

#[test]
fn a_strangers_visit_that_tidies_up_does_no_harm() {
    for pragma in ["PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA journal_mode = DELETE"] {
        let dir = filled();
        let conn = rusqlite::Connection::open(dir.path().join("db/sublet.db")).unwrap();
        conn.query_row(pragma, [], |_| Ok(())).unwrap();
        drop(conn);
        assert!(!dir.path().join("db/sublet.db-wal").exists());
        use_it(dir.path()).unwrap();
        assert_eq!(whole_trail(&Store::open(dir.path()).unwrap()), 201);
    }
}

#[test]
fn state_is_made_for_us_alone_whatever_the_parents() {
    let dir = state();
    let deep = dir.path().join("a/b/state");
    drop(Store::open(&deep).unwrap());
    let mode = |path: &str| fs::metadata(deep.join(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode(""), mode("db")), (0o700, 0o700));
    for file in ["db/sublet.db", "db/sublet.db-wal", "db/sublet.db-shm", "db/owners"] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
    assert_eq!(fs::read_dir(deep.join("db")).unwrap().count(), 4, "nothing is left over");
}

#[test]
fn state_that_others_could_change_is_refused() {
    #[track_caller]
    fn check(spoil: impl Fn(&Path), usable: bool) {
        let dir = state();
        let root = dir.path().join("parent/state");
        drop(Store::open(&root).unwrap());
        spoil(&root);
        match Store::open(&root) {
            Ok(_) => assert!(usable),
            Err(e) => assert!(!usable && matches!(e, StoreError::Unsafe { .. }), "{e:?}"),
        }
        match Reader::open(&root) {
            Ok(_) => assert!(usable),
            Err(e) => assert!(!usable && matches!(e, StoreError::Unsafe { .. }), "{e:?}"),
        }
    }
    let mode = |path: PathBuf, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let linked = |path: PathBuf| {
        let moved = path.with_extension("moved");
        fs::rename(&path, &moved).unwrap();
        symlink(moved, path).unwrap();
    };
    check(|_| {}, true);
    check(|root| mode(root.to_owned(), 0o755), true);
    check(|root| mode(root.to_owned(), 0o770), false);
    check(|root| mode(root.to_owned(), 0o702), false);
    check(|root| mode(root.join("db"), 0o720), false);
    check(|root| mode(root.join("db/sublet.db"), 0o660), false);
    check(|root| mode(root.join("db/sublet.db-wal"), 0o602), false);
    check(|root| mode(root.parent().unwrap().to_owned(), 0o777), false);
    check(|root| mode(root.parent().unwrap().to_owned(), 0o1777), true);
    // A link of ours to a directory of ours, as systemd makes for DynamicUser=.
    check(|root| linked(root.to_owned()), true);
    check(|root| linked(root.join("db")), false);
    for file in ["sublet.db", "sublet.db-wal", "sublet.db-shm", "owners"] {
        check(|root| linked(root.join("db").join(file)), false);
    }
    check(
        |root| {
            fs::remove_file(root.join("db/owners")).unwrap();
            fs::create_dir(root.join("db/owners")).unwrap();
        },
        false,
    );
    if rustix::process::geteuid().is_root() {
        let give = |path: PathBuf| std::os::unix::fs::chown(path, Some(12345), None).unwrap();
        check(|root| give(root.join("db")), false);
        check(|root| give(root.join("db/sublet.db")), false);
    }
}

#[test]
fn root_does_not_open_what_another_user_recorded() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = filled();
    for path in ["", "db", "db/sublet.db", "db/sublet.db-wal", "db/sublet.db-shm", "db/owners"] {
        std::os::unix::fs::chown(dir.path().join(path), Some(12345), None).unwrap();
    }
    assert!(matches!(Store::open(dir.path()), Err(StoreError::Unsafe { .. })));
    assert!(matches!(Reader::open(dir.path()), Err(StoreError::Unsafe { .. })));
}

/// A database as the first version made it, with one open lease and one event.
fn of_version_1() -> tempfile::TempDir {
    let dir = filled();
    let conn = rusqlite::Connection::open(dir.path().join("db/sublet.db")).unwrap();
    conn.execute_batch(
        "DROP TABLE mint; DROP INDEX lease_due; DROP INDEX lease_of_run; DROP INDEX exec_live; DROP INDEX exec_of_run;
         CREATE INDEX lease_open ON lease (owner) WHERE state IN ('granted', 'consumed');
         CREATE INDEX exec_running ON exec (owner) WHERE state = 'running';
         PRAGMA user_version = 1;",
    )
    .unwrap();
    dir
}

#[test]
fn a_database_of_the_first_version_is_brought_up_to_date_once() {
    let dir = of_version_1();
    // Who only looks changes nothing, and reads what was there.
    let reader = Reader::open(dir.path()).unwrap();
    let seen = |reader: &Reader| {
        reader.read(|view| Ok((view.has_step(2)?, view.events().count()))).unwrap()
    };
    assert_eq!(seen(&reader), (false, 200));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| use_it(dir.path()).unwrap());
        }
    });
    assert_eq!(seen(&reader), (true, 208), "the open reader sees it too");
    let new = state();
    drop(Store::open(new.path()).unwrap());
    let tables = |dir: &Path| -> Vec<String> {
        let conn = rusqlite::Connection::open(dir.join("db/sublet.db")).unwrap();
        let mut rows = conn.prepare("SELECT name FROM sqlite_schema ORDER BY name").unwrap();
        rows.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    };
    assert_eq!(tables(dir.path()), tables(new.path()), "one that is made anew has the same");
}
