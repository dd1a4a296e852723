//! The `ssh` channel: an agent's socket of the one exec, on which the broker lists certificates and signs
//! what logs in with one, one signature a use. draft-ietf-sshm-ssh-agent; RFC 4252 §7.
//!
//! Parses hostile input: the command may write anything to the socket. No key and no value passes it.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use crate::delivery::git;
use crate::model::ssh::{Reader, Writer};

/// Where the socket is inside, and the variable that says so.
pub const SOCKET: &str = "/run/sublet/ssh.sock";
pub const VARIABLE: &str = "SSH_AUTH_SOCK";

const FAILURE: u8 = 5;
const REQUEST_IDENTITIES: u8 = 11;
const IDENTITIES_ANSWER: u8 = 12;
const SIGN_REQUEST: u8 = 13;
const SIGN_RESPONSE: u8 = 14;

/// SSH_MSG_USERAUTH_REQUEST.
const USERAUTH_REQUEST: u8 = 50;
/// As much as a login's data ever is, with room for a host key of any kind.
const MAX_MESSAGE: usize = 32 << 10;
/// An exec's connections at once: ssh has one.
pub const MOST: usize = 16;

/// Launcher's side: binds the socket in the exec's detached root, for the exec's user alone.
pub fn listen(root: BorrowedFd<'_>, owner: (u32, u32)) -> io::Result<OwnedFd> {
    git::listen_at(root, SOCKET, owner)
}

/// What a client asks.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked<'a> {
    Identities,
    Sign {
        key: &'a [u8],
        data: &'a [u8],
    },
    /// Adding, removing, locking, extensions: nothing of that is here.
    Else,
}

/// Parses one message, without its length.
pub fn parse(message: &[u8]) -> Option<Asked<'_>> {
    let mut reader = Reader::new(message);
    match reader.u8()? {
        REQUEST_IDENTITIES if reader.is_empty() => Some(Asked::Identities),
        SIGN_REQUEST => {
            let (key, data) = (reader.string()?, reader.string()?);
            // Flags choose among RSA's hashes; for Ed25519 there are none.
            let flags = reader.u32()?;
            (flags == 0 && reader.is_empty()).then_some(Asked::Sign { key, data })
        }
        _ => Some(Asked::Else),
    }
}

/// A login, as its data says it.
#[derive(Debug, PartialEq, Eq)]
pub struct Login<'a> {
    pub user: &'a str,
    /// The server's, where the client has bound the login to it.
    pub host_key: Option<&'a [u8]>,
}

/// Whether the data is a login with this certificate, and nothing else: no signature of a file, a commit or
/// another protocol can be had by it. RFC 4252 §7, and OpenSSH's `publickey-hostbound-v00@openssh.com`.
pub fn login<'a>(data: &'a [u8], certificate: &[u8]) -> Option<Login<'a>> {
    let mut reader = Reader::new(data);
    let session = reader.string()?;
    // A hash of the key exchange: 20 bytes at least. It begins with a length, which `SSHSIG` does not.
    if !(20..=64).contains(&session.len()) || reader.u8()? != USERAUTH_REQUEST {
        return None;
    }
    let user = std::str::from_utf8(reader.string()?).ok()?;
    if reader.string()? != b"ssh-connection" {
        return None;
    }
    let is_bound = match reader.string()? {
        b"publickey" => false,
        b"publickey-hostbound-v00@openssh.com" => true,
        _ => return None,
    };
    if reader.u8()? != 1 || reader.string()? != b"ssh-ed25519-cert-v01@openssh.com" {
        return None;
    }
    if reader.string()? != certificate {
        return None;
    }
    let host_key = if is_bound { Some(reader.string()?) } else { None };
    reader.is_empty().then_some(Login { user, host_key })
}

/// Certificates with what people call them.
pub fn identities<'a>(all: impl ExactSizeIterator<Item = (&'a [u8], &'a str)>) -> Vec<u8> {
    let mut answer = Writer::default().u8(IDENTITIES_ANSWER).u32(all.len() as u32);
    for (certificate, comment) in all {
        answer = answer.string(certificate).string(comment.as_bytes());
    }
    answer.done()
}

pub fn signed(signature: &[u8]) -> Vec<u8> {
    Writer::default().u8(SIGN_RESPONSE).string(signature).done()
}

pub fn refused() -> Vec<u8> {
    vec![FAILURE]
}

/// One client's connection, for as long as it likes.
pub struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Connection {
    /// Accepts one, if one waits; of another user it is dropped.
    pub fn accept(listener: &UnixListener, expected_uid: u32) -> io::Result<Option<Self>> {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let peer = rustix::net::sockopt::socket_peercred(stream.as_fd())?;
        if peer.uid.as_raw() != expected_uid {
            return Ok(None);
        }
        stream.set_nonblocking(true)?;
        Ok(Some(Self { stream, received: Vec::new() }))
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Takes what has come. False once the client is gone, or has said what is no message.
    pub fn receive(&mut self) -> bool {
        let mut chunk = [0; 4096];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(n) => self.received.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
            if self.received.len() > MAX_MESSAGE + 4 {
                return false;
            }
        }
    }

    /// The next whole message, without its length. An error where there cannot be one.
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, ()> {
        let Some(len) = self.received.first_chunk().map(|len| u32::from_be_bytes(*len)) else {
            return Ok(None);
        };
        let len = len as usize;
        if len == 0 || len > MAX_MESSAGE {
            return Err(());
        }
        if self.received.len() < 4 + len {
            return Ok(None);
        }
        let rest = self.received.split_off(4 + len);
        let message = std::mem::replace(&mut self.received, rest);
        Ok(Some(message[4..].to_vec()))
    }

    /// Sends an answer. False where the client does not take it: it fits what a socket holds.
    pub fn send(&mut self, answer: &[u8]) -> bool {
        let framed = Writer::default().string(answer).done();
        matches!(self.stream.write(&framed), Ok(n) if n == framed.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CERTIFICATE: &[u8] = b"the certificate";

    fn data(method: &[u8], host_key: Option<&[u8]>) -> Vec<u8> {
        let data = Writer::default()
            .string(&[7; 32])
            .u8(USERAUTH_REQUEST)
            .string(b"git")
            .string(b"ssh-connection")
            .string(method)
            .u8(1)
            .string(b"ssh-ed25519-cert-v01@openssh.com")
            .string(CERTIFICATE);
        match host_key {
            Some(key) => data.string(key),
            None => data,
        }
        .done()
    }

    #[test]
    fn only_a_login_with_this_certificate_is_signed() {
        let plain = data(b"publickey", None);
        assert_eq!(login(&plain, CERTIFICATE), Some(Login { user: "git", host_key: None }));
        let bound = data(b"publickey-hostbound-v00@openssh.com", Some(b"host key"));
        let found = login(&bound, CERTIFICATE).unwrap();
        assert_eq!(found.host_key, Some(&b"host key"[..]));

        #[track_caller]
        fn refuse(data: &[u8]) {
            assert_eq!(login(data, CERTIFICATE), None);
        }
        assert_eq!(login(&plain, b"another"), None);
        refuse(&data(b"hostbased", None));
        refuse(&data(b"publickey-hostbound-v00@openssh.com", None));
        refuse(&[&plain[..], b"more"].concat());
        for cut in 0..plain.len() {
            refuse(&plain[..cut]);
        }
        // PROTOCOL.sshsig: a signature of a file, or of a commit.
        let mut sshsig = b"SSHSIG".to_vec();
        sshsig.extend(
            Writer::default().string(b"git").string(b"").string(b"sha512").string(&[0; 64]).done(),
        );
        refuse(&sshsig);
    }

    #[test]
    fn messages_are_parsed_and_everything_else_is_nothing() {
        assert_eq!(parse(&[REQUEST_IDENTITIES]), Some(Asked::Identities));
        assert_eq!(parse(&[REQUEST_IDENTITIES, 0]), Some(Asked::Else));
        let sign = Writer::default().u8(SIGN_REQUEST).string(b"k").string(b"d").u32(0).done();
        assert_eq!(parse(&sign), Some(Asked::Sign { key: b"k", data: b"d" }));
        for cut in 1..sign.len() {
            assert_eq!(parse(&sign[..cut]), None, "{cut}");
        }
        assert_eq!(parse(&[]), None);
        // Add, remove all, lock, extension.
        for kind in [17, 19, 22, 25, 27] {
            assert_eq!(parse(&[kind, 1, 2, 3]), Some(Asked::Else));
        }
    }

    #[test]
    fn a_connection_gives_whole_messages_and_ends_with_what_is_none() {
        let (mut client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        let mut connection = Connection { stream: server, received: Vec::new() };
        client.write_all(&[0, 0, 0, 1, 11, 0, 0, 0, 2, 9]).unwrap();
        assert!(connection.receive());
        assert_eq!(connection.next(), Ok(Some(vec![11])));
        assert_eq!(connection.next(), Ok(None));
        client.write_all(&[8]).unwrap();
        assert!(connection.receive());
        assert_eq!(connection.next(), Ok(Some(vec![9, 8])));
        client.write_all(&[0xff; 4]).unwrap();
        assert!(connection.receive());
        assert_eq!(connection.next(), Err(()));
        drop(client);
        assert!(!connection.receive());
    }
}
