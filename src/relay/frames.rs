//! The frames of an exec's stream between broker and client, as docker's attach has them: one byte of
//! kind, three zeros, the payload's length as four bytes big endian, the payload.
//!
//! Bytes and JSON that are longer than one frame may be go in several of the same kind; a JSON text is
//! whole with the first of its frames that is shorter than [`MAX_PAYLOAD`].
//!
//! Pure. A header that is none, or a payload beyond [`MAX_PAYLOAD`], ends the stream: nothing is skipped.
#![forbid(unsafe_code)]

/// Bytes.
pub const HEADER: usize = 8;
/// Bytes of payload in one frame.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To the command's standard input; an empty one is its end.
    Stdin = 0,
    /// From the command's standard output. From the client, and then empty: nobody reads it any more, the
    /// command shall meet a closed pipe.
    Stdout = 1,
    /// As [`Kind::Stdout`], for standard error.
    Stderr = 2,
    /// One byte: the signal's number.
    Signal = 3,
    /// Rows and columns of the client's terminal, two bytes big endian each.
    Window = 4,
    /// JSON: `{"exec_id"}`.
    Started = 5,
    /// JSON: the report. The last; a frame that is full is continued by the next.
    Exit = 6,
    /// JSON: an error object. The last, in the same way.
    Error = 7,
}

impl Kind {
    pub const ALL: [Kind; 8] = [
        Kind::Stdin,
        Kind::Stdout,
        Kind::Stderr,
        Kind::Signal,
        Kind::Window,
        Kind::Started,
        Kind::Exit,
        Kind::Error,
    ];

    fn of(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// The bytes are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame begins with {0:02x?}, which is no frame's header")]
    Header([u8; 4]),
    #[error("a frame of {0} bytes is larger than {MAX_PAYLOAD}")]
    TooLarge(usize),
}

/// The header of a frame; `length` is at most [`MAX_PAYLOAD`].
pub fn header(kind: Kind, length: usize) -> [u8; HEADER] {
    debug_assert!(length <= MAX_PAYLOAD);
    let [a, b, c, d] = (length as u32).to_be_bytes();
    [kind as u8, 0, 0, 0, a, b, c, d]
}

/// The most bytes that [`push`] appends for so many of payload.
pub fn room(payload: usize) -> usize {
    payload + HEADER * (payload / MAX_PAYLOAD + 1)
}

/// Appends `payload` as one frame, or as several where it is longer than one may be.
pub fn push(kind: Kind, payload: &[u8], out: &mut Vec<u8>) {
    let is_json = matches!(kind, Kind::Started | Kind::Exit | Kind::Error);
    let fills_its_frames = payload.len().is_multiple_of(MAX_PAYLOAD);
    for chunk in payload.chunks(MAX_PAYLOAD) {
        out.extend_from_slice(&header(kind, chunk.len()));
        out.extend_from_slice(chunk);
    }
    if payload.is_empty() || (is_json && fills_its_frames) {
        out.extend_from_slice(&header(kind, 0));
    }
}

/// A frame's kind and payload, and how many bytes it took with its header.
pub type Taken<'a> = (Kind, &'a [u8], usize);

/// Takes the first whole frame of `bytes`: its kind, its payload, and how many bytes it took. `None` if
/// more must be read first.
///
/// # Errors
/// [`FrameError`] as soon as the header tells it.
pub fn take(bytes: &[u8]) -> Result<Option<Taken<'_>>, FrameError> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
    let &[byte, z1, z2, z3, a, b, c, d] = head;
    let kind = match (Kind::of(byte), [z1, z2, z3]) {
        (Some(kind), [0, 0, 0]) => kind,
        _ => return Err(FrameError::Header([byte, z1, z2, z3])),
    };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if length > MAX_PAYLOAD {
        return Err(FrameError::TooLarge(length));
    }
    Ok(rest.get(..length).map(|payload| (kind, payload, HEADER + length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_whole_and_only_whole() {
        for kind in Kind::ALL {
            for size in [0, 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 3 * MAX_PAYLOAD] {
                let payload = vec![7; size];
                let mut bytes = Vec::new();
                push(kind, &payload, &mut bytes);
                assert!(bytes.len() <= room(size));
                let (mut got, mut at) = (Vec::new(), 0);
                while at < bytes.len() {
                    let (k, p, taken) = take(&bytes[at..]).unwrap().unwrap();
                    assert_eq!(k, kind);
                    got.extend_from_slice(p);
                    at += taken;
                }
                assert_eq!(got, payload);
                assert_eq!(take(&bytes[..bytes.len().min(MAX_PAYLOAD + HEADER) - 1]), Ok(None));
            }
        }
    }

    #[test]
    fn what_is_no_frame_is_an_error_at_once() {
        assert_eq!(take(&[8, 0, 0, 0, 0, 0, 0, 0]), Err(FrameError::Header([8, 0, 0, 0])));
        assert_eq!(take(&[1, 0, 1, 0, 0, 0, 0, 0]), Err(FrameError::Header([1, 0, 1, 0])));
        assert_eq!(take(&[1, 0, 0, 0, 0, 1, 0, 1]), Err(FrameError::TooLarge(MAX_PAYLOAD + 1)));
        assert_eq!(take(&[1, 0, 0]), Ok(None));
    }
}
