use super::*;
use crate::model::secret::Secret;
use crate::relay::frames;
use std::io::{Read, Write};

fn masks(values: &[&[u8]]) -> Rc<Masks> {
    let copy = |value: &&[u8]| Rc::new(Secret::copy_of(value).unwrap());
    Rc::new(Masks::new(values.iter().map(copy).collect()))
}

fn relay(chunks: &[&[u8]], values: &[&[u8]]) -> (Vec<u8>, u64) {
    let (from, mut writer) = io::pipe().unwrap();
    let (mut reader, to) = io::pipe().unwrap();
    let masked = {
        let mut output = Output::new(from.into(), to.as_fd()).unwrap();
        output.mask(&masks(values));
        for chunk in chunks {
            writer.write_all(chunk).unwrap();
            output.ready().unwrap();
        }
        drop(writer);
        while !output.is_done() {
            output.ready().unwrap();
        }
        output.masked()
    };
    drop(to);
    let mut got = Vec::new();
    reader.read_to_end(&mut got).unwrap();
    (got, masked)
}

#[test]
fn bytes_pass_and_values_do_not() {
    assert_eq!(relay(&[b"a\0b\xff", b"c"], &[]).0, b"a\0b\xffc");
    let (got, masked) = relay(&[b"x hunter2", b"hunter2 y"], &[b"hunter2hunter2"]);
    assert_eq!((&got[..], masked), (&b"x *** y"[..], 1));
}

#[test]
fn what_may_hold_a_value_is_wiped_once_it_is_written() {
    let (from, mut writer) = io::pipe().unwrap();
    let (ours, mut client) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let connection = Rc::new(RefCell::new(Connection::new(ours)));
    let mut output = Output::framed(from.into(), &connection, Kind::Stdout);
    // Masks nothing: too short, as `redact = false` has it too.
    output.mask(&masks(&[b"hunter2"]));
    writer.write_all(b"hunter2").unwrap();
    output.ready().unwrap();
    let mut got = [0; frames::HEADER + 7];
    client.read_exact(&mut got).unwrap();
    assert!(got.ends_with(b"hunter2"));
    assert_eq!(output.buffer, [0; 7]);
}

#[test]
fn a_pipe_that_a_value_went_through_is_written_over() {
    #[track_caller]
    fn check(said: &[u8], left: usize) {
        let (from, mut writer) = io::pipe().unwrap();
        let mut after = from.try_clone().unwrap();
        let (_reader, to) = io::pipe().unwrap();
        let mut output = Output::new(from.into(), to.as_fd()).unwrap();
        if left > 0 {
            output.mask(&masks(&[b"hunter2hunter2"]));
        }
        writer.write_all(said).unwrap();
        output.ready().unwrap();
        assert!(left == 0 || output.buffer.iter().all(|&b| b == 0));
        drop(writer);
        while !output.is_done() {
            output.ready().unwrap();
        }
        let mut pages = Vec::new();
        after.read_to_end(&mut pages).unwrap();
        assert_eq!(pages, vec![0; left]);
    }
    check(b"x hunter2hunter2 y", KEPT_BY_A_PIPE);
    check(b"hidden by other means", KEPT_BY_A_PIPE);
    check(b"no lease", 0);
}

#[test]
fn a_reader_that_is_gone_ends_the_stream() {
    let (from, mut writer) = io::pipe().unwrap();
    let (reader, to) = io::pipe().unwrap();
    drop(reader);
    let mut output = Output::new(from.into(), to.as_fd()).unwrap();
    writer.write_all(b"x").unwrap();
    output.ready().unwrap();
    assert!(output.is_done());
}
