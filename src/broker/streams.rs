//! A client's socket, as an exec takes it over from HTTP: first to write on, and to read from once nobody else
//! does.
#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;

use crate::run::mailbox::{Mail, Mailbox};

/// Where an exec speaks with its client.
pub struct ClientStream {
    /// Does not block.
    pub socket: UnixStream,
    /// What the client is told when all is granted and recorded, before any frame.
    pub greeting: Vec<u8>,
    /// Called before that: who wrote on the socket and read from it does so no more.
    pub taken: Box<dyn FnOnce() + Send>,
}

/// Lets an exec hear its client. Dropped before it has, its client is gone, and it is killed.
#[derive(Debug)]
pub struct ReadAhead(Option<Mailbox>);

impl ReadAhead {
    pub fn to(mailbox: Mailbox) -> Self {
        Self(Some(mailbox))
    }

    /// Nobody else reads from the socket any more. `bytes` were read, and go before what comes.
    pub fn give(mut self, bytes: Vec<u8>) {
        self.send(Mail::ReadAhead(bytes));
    }

    fn send(&mut self, mail: Mail) {
        let Some(mailbox) = self.0.take() else { return };
        if let Err(error) = mailbox.send(mail) {
            tracing::error!(%error, "could not reach a living exec");
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.send(Mail::ClientGone);
    }
}
