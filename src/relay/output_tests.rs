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

/// Both streams of a command that go to one place: a line that waits would have the other stream's in it.
#[test]
fn lines_of_two_streams_stay_whole() {
    const VALUE: &[u8] = b"tok-ABCDEFGH12345";
    let (mut reader, to) = io::pipe().unwrap();
    let pipes = || io::pipe().unwrap();
    let ((out, mut out_writer), (err, mut err_writer)) = (pipes(), pipes());
    let mut streams = [out, err].map(|from| Output::new(from.into(), to.as_fd()).unwrap());
    let masks = masks(&[VALUE]);
    streams.iter_mut().for_each(|stream| stream.mask(&masks));
    let [stdout, stderr] = &mut streams;
    let hex: String = VALUE.iter().map(|byte| format!("{byte:02x}")).collect();
    let characters = (b' '..=b'~').map(|byte| char::from(byte).to_string());
    // Those that begin the value in hex and base64, and the whole of it.
    let ends = characters.chain(["74", "746", "dG", "Qr", hex.as_str()].map(str::to_owned));
    let (mut lines, mut expected) = (0, String::new());
    for end in ends {
        for (name, stream, writer) in
            [("out", &mut *stdout, &mut out_writer), ("err", &mut *stderr, &mut err_writer)]
        {
            writer.write_all(format!("{name} {end}\n").as_bytes()).unwrap();
            stream.ready().unwrap();
            assert!(stream.patience().is_none(), "{name} {end:?} is held");
            expected.push_str(&format!("{name} {}\n", end.replace(&hex, "***")));
            lines += 1;
        }
    }
    drop((out_writer, err_writer));
    for stream in &mut streams {
        while !stream.is_done() {
            stream.ready().unwrap();
        }
    }
    drop(streams);
    drop(to);
    let mut got = String::new();
    reader.read_to_string(&mut got).unwrap();
    assert_eq!(got, expected);
    assert_eq!(got.lines().count(), lines);
}

/// The price of that: of a value that goes on in the next line, three characters at most.
#[test]
fn a_value_whose_lines_come_one_by_one_is_masked() {
    // The base64 of the value.
    let text = b"aHVudGVyMmh1bnRlcjI";
    for at in 1..text.len() {
        let line = [&text[..at], b"\n"].concat();
        let (got, masked) = relay(&[&line, &text[at..], b"\n"], &[b"hunter2hunter2"]);
        let shown = if at < 3 { &line[..] } else { b"" };
        assert_eq!((got, masked), ([shown, b"***\n"].concat(), 1), "at {at}");
    }
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
