//! `sublet git-credential get|store|erase`: runs inside the exec, as git's helper. Passes git's request
//! on to the socket and the answer back. Holds no authority: the socket does.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::net::UnixStream;

use zeroize::Zeroizing;

use super::container::MAX_CONTENT;
use super::git::{MEMFD, SOCKET, TAKES_MEMFD};
use crate::sys::socket;

/// The longest line that says why there is none.
const MAX_REFUSAL: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    #[error("could not read git's request")]
    Request(#[source] io::Error),
    #[error("could not reach {SOCKET}: this command runs only inside an exec with a git lease")]
    Socket(#[source] io::Error),
    #[error("could not write the answer to git")]
    Answer(#[source] io::Error),
    #[error("{0}")]
    Refused(String),
}

/// Asks for git. Nothing is printed for what is refused: git then goes on without a credential.
pub fn ask(
    operation: &str,
    request: impl BufRead,
    mut answer: impl Write,
) -> Result<(), HelperError> {
    let mut message = format!("{operation}\n").into_bytes();
    for line in request.split(b'\n') {
        let line = line.map_err(HelperError::Request)?;
        if line.is_empty() {
            break;
        }
        // What git learnt elsewhere is none of the broker's business.
        if !line.starts_with(b"password=") {
            message.extend_from_slice(&line);
            message.push(b'\n');
        }
    }
    message.extend_from_slice(TAKES_MEMFD.as_bytes());
    message.extend_from_slice(b"\n\n");
    let mut socket = UnixStream::connect(SOCKET).map_err(HelperError::Socket)?;
    socket.write_all(&message).map_err(HelperError::Socket)?;
    let (mut said, mut memfd) = (Vec::new(), None);
    let mut chunk = [0; 1024];
    // A refusal comes in pieces; with the memfd all is said.
    while memfd.is_none() && said.len() <= MAX_REFUSAL {
        let take = |fd| memfd = Some(File::from(fd));
        match socket::receive(&socket, &mut chunk, take) {
            Ok(0) => break,
            Ok(n) => said.extend_from_slice(&chunk[..n]),
            Err(e) => return Err(HelperError::Socket(e.into())),
        }
    }
    match (said.as_slice(), memfd) {
        (MEMFD, Some(memfd)) => {
            // Roomy, so that it is not moved while it grows and every copy is wiped.
            let mut reply = Zeroizing::new(Vec::with_capacity(MAX_CONTENT + 1));
            memfd.take(MAX_CONTENT as u64).read_to_end(&mut reply).map_err(HelperError::Socket)?;
            answer.write_all(&reply).and_then(|()| answer.flush()).map_err(HelperError::Answer)
        }
        (said, _) => match said.strip_prefix(b"sublet-refused=") {
            Some(why) => {
                Err(HelperError::Refused(String::from_utf8_lossy(why).trim_end().to_owned()))
            }
            // It left without a word.
            None => Ok(()),
        },
    }
}
