//! The frames of an exec's stream: the whole input is what came over the socket, in pieces.
#![forbid(unsafe_code)]

use sublet::relay::frames::{HEADER, Kind, MAX_PAYLOAD, header, push, take};

use super::feed::Feed;

pub fn run(input: &[u8]) {
    let (whole, end) = frames(input);
    // Whatever the pieces, the same frames come out, and an error at the same frame.
    let mut feed = Feed::new(input);
    let (mut buffer, mut pieces, mut rest) = (Vec::new(), Vec::new(), input);
    let mut failed = false;
    while !rest.is_empty() && !failed {
        let (piece, later) = rest.split_at((usize::from(feed.byte()) + 1).min(rest.len()));
        buffer.extend_from_slice(piece);
        rest = later;
        let (some, end) = frames(&buffer);
        failed = end.is_none();
        let taken: usize = some.iter().map(|(_, payload)| HEADER + payload.len()).sum();
        pieces.extend(some);
        buffer.drain(..taken);
    }
    assert_eq!(pieces, whole);
    assert_eq!(failed, end.is_none());
    // Written again they are the bytes that were read.
    let mut written = Vec::new();
    for (kind, payload) in &whole {
        written.extend_from_slice(&header(*kind, payload.len()));
        written.extend_from_slice(payload);
    }
    assert!(input.starts_with(&written));
    assert!(end.is_none_or(|end| end == written.len()));
    // Any payload crosses whole.
    let mut out = Vec::new();
    push(Kind::Stdout, input, &mut out);
    let (through, end) = frames(&out);
    assert_eq!(end, Some(out.len()));
    assert_eq!(through.iter().flat_map(|(_, p)| p).copied().collect::<Vec<u8>>(), input);
}

type Frame = (Kind, Vec<u8>);

/// The whole frames at the beginning of `bytes`, and where they end; no end if what follows is no frame.
fn frames(bytes: &[u8]) -> (Vec<Frame>, Option<usize>) {
    let (mut found, mut at) = (Vec::new(), 0);
    loop {
        match take(&bytes[at..]) {
            Ok(Some((kind, payload, taken))) => {
                assert!(payload.len() <= MAX_PAYLOAD && taken == HEADER + payload.len());
                assert_eq!(bytes[at..at + HEADER], header(kind, payload.len()));
                found.push((kind, payload.to_vec()));
                at += taken;
            }
            Ok(None) => {
                assert!(bytes.len() - at < HEADER + MAX_PAYLOAD);
                return (found, Some(at));
            }
            Err(e) => {
                assert!(!e.to_string().is_empty());
                return (found, None);
            }
        }
    }
}
