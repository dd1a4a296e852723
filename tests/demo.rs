//! `sublet demo`: the main job end to end, with nothing at hand.
#![forbid(unsafe_code)]

mod support;

use std::fs;
use std::process::Command;

use serial_test::file_serial;
use support::World;
use support::host::Traces;
use support::world::{binary, finish};

fn demo(world: &World) -> Command {
    let mut demo = Command::new(binary());
    world.dress(&mut demo);
    demo.arg("demo");
    demo
}

#[test]
#[file_serial]
fn it_shows_delivery_sibling_scrub_and_trail_and_leaves_nothing() {
    for world in World::each() {
        let before = Traces::now();
        let outcome = finish(demo(&world), b"", None).ok();
        let text = outcome.out().to_lowercase();
        for word in ["deliver", "sibling", "scrub", "lease.granted"] {
            assert!(text.contains(word), "the demo does not show `{word}`\n{outcome}");
        }
        assert_eq!(Traces::now(), before);
        let left: Vec<_> = fs::read_dir(world.path("home")).unwrap().flatten().collect();
        assert!(left.is_empty(), "the demo left {left:?} at home");
        let left: Vec<_> = fs::read_dir(&world.workspace).unwrap().flatten().collect();
        assert!(left.is_empty(), "the demo left {left:?} in the working directory");
    }
}

#[test]
#[file_serial]
fn it_works_twice_and_from_any_directory() {
    for world in World::each() {
        for dir in ["/", "/usr", "/tmp"] {
            let mut demo = demo(&world);
            demo.current_dir(dir);
            finish(demo, b"", None).ok();
        }
    }
}
