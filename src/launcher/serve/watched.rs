//! What the loop watches: an epoll entry's word says which thing it stands for.
#![forbid(unsafe_code)]

/// A number of this launcher's own, for what it watches.
pub(super) type Key = u32;

/// The session that was there first: its end is the broker's.
pub(super) const ROOT: Key = 0;

/// What an epoll entry stands for: a key, shifted, and what it is the key of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    Session(Key),
    Socket(Key),
    Process(Key),
    Helper(Key),
    Alarm,
}

impl Token {
    pub(super) fn encode(self) -> u64 {
        let (key, kind) = match self {
            Token::Alarm => (0, 0),
            Token::Session(key) => (key, 1),
            Token::Socket(key) => (key, 2),
            Token::Process(key) => (key, 3),
            Token::Helper(key) => (key, 4),
        };
        u64::from(key) << 3 | kind
    }

    pub(super) fn decode(word: u64) -> Self {
        let key = (word >> 3) as Key;
        match word & 7 {
            1 => Token::Session(key),
            2 => Token::Socket(key),
            3 => Token::Process(key),
            4 => Token::Helper(key),
            _ => Token::Alarm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_they_stand_for() {
        for key in [ROOT, 1, 7, Key::MAX] {
            for token in
                [Token::Session(key), Token::Socket(key), Token::Process(key), Token::Helper(key)]
            {
                assert_eq!(Token::decode(token.encode()), token);
            }
        }
        assert_eq!(Token::decode(Token::Alarm.encode()), Token::Alarm);
    }
}
