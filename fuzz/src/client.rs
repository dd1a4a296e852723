//! What a broker, or whoever sits on its socket, answers to our client: the first byte says what was asked,
//! the second how large the pieces are in which the rest, the answer, comes.
//!
//! The client returns, whatever it is told.
#![forbid(unsafe_code)]

use std::cell::OnceCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use sublet::api::client::{Client, ClientError, Frame};
use sublet::api::wire::{ExecBody, LeaseBody, RenewBody, RevocationBody};

thread_local! {
    static STRANGER: OnceCell<Stranger> = const { OnceCell::new() };
}

/// Whoever answers: says the bytes that it is given on the next connection.
struct Stranger {
    path: PathBuf,
    says: SyncSender<(usize, Vec<u8>)>,
    _directory: tempfile::TempDir,
}

impl Stranger {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).expect("a new path");
        let (says, said) = sync_channel::<(usize, Vec<u8>)>(1);
        std::thread::spawn(move || {
            for (piece, bytes) in said {
                let (mut stream, _) = listener.accept().expect("the client connects");
                // Spoken to before it has asked, the client would take another connection.
                drop(stream.read(&mut [0; 4096]));
                for piece in bytes.chunks(piece) {
                    // A client that has heard enough does not read on.
                    if stream.write_all(piece).is_err() {
                        break;
                    }
                }
                drop(stream.shutdown(Shutdown::Write));
                // Closed with unread bytes, the socket would be reset.
                drop(stream.read_to_end(&mut Vec::new()));
            }
        });
        Self { path, says, _directory: directory }
    }
}

pub fn run(input: &[u8]) {
    let [which, piece, answer @ ..] = input else { return };
    STRANGER.with(|cell| {
        let stranger = cell.get_or_init(Stranger::new);
        let answer = (usize::from(*piece) + 1, answer.to_vec());
        stranger.says.send(answer).expect("the stranger lives");
        let client = Client::connect(&stranger.path).expect("it listens");
        ask(*which, &client.with_patience(Duration::from_secs(5)));
    });
}

fn ask(which: u8, client: &Client) {
    let lease: LeaseBody =
        serde_json::from_str(r#"{"capability":"a","audience":"b"}"#).expect("a body");
    let id = "lse_0123456789abcdef0123456789abcdef".parse().expect("an id");
    let told = match which % 10 {
        0 => client.request(&lease).map(|lease| drop(serde_json::to_string(&lease))),
        1 => client.leases(None).map(drop),
        2 => client.run().map(drop),
        3 => client.exec_to_end(&ExecBody::of(["true"])).map(drop),
        4 => client.metrics().map(drop),
        5 => client.events(0, false).and_then(|events| {
            for event in events {
                let event = event?;
                assert!(!event.is_empty() && !event.contains('\n'));
            }
            Ok(())
        }),
        6 => client.renew(&id, &RenewBody::default()).map(drop),
        7 => client.revoke_all(&RevocationBody::default()).map(drop),
        _ => exec(client),
    };
    if let Err(e) = told {
        assert!(!matches!(e, ClientError::Silent | ClientError::Connect { .. }), "{e:?}");
        assert!(!e.to_string().is_empty() || e.refusal().is_some());
    }
}

/// The exec's stream ends in an exit, a failure or an error, and then says nothing more.
fn exec(client: &Client) -> Result<(), ClientError> {
    let mut stream = client.exec(&ExecBody::of(["true"]))?;
    stream.stdin(b"some input");
    stream.end_stdin();
    let mut is_over = false;
    while let Some(frame) = stream.next_frame()? {
        assert!(!is_over, "something came after the end");
        is_over = matches!(frame, Frame::Exit(_) | Frame::Failed(_));
    }
    assert!(is_over && stream.is_over());
    assert!(matches!(stream.next_frame(), Ok(None)));
    Ok(())
}
