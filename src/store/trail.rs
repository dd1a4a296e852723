//! The trail: events are appended, read in order, and never changed.
#![forbid(unsafe_code)]

use rusqlite::OptionalExtension;
use rusqlite::types::ValueRef;

use crate::model::event::{Draft, Event, Head, RecordedEvent};
use crate::store::error::StoreError;
use crate::store::{Tx, View};

impl Tx<'_> {
    /// Seals `draft` as the next event.
    pub fn append(&mut self, draft: Draft) -> Result<Event, StoreError> {
        let (event, row) = draft.sealed(&self.head);
        self.prepare("INSERT INTO event (seq, hash, body) VALUES (?1, ?2, ?3)")?
            .execute((row.seq, &row.hash, &row.body))
            .map_err(self.error())?;
        self.head = event.head();
        Ok(event)
    }
}

impl View<'_> {
    /// The last event's place and hash, [`Head::EMPTY`] if there is none.
    pub fn head(&self) -> Result<Head, StoreError> {
        let last: Option<(u64, String)> = self
            .prepare("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1")?
            .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
            .map_err(self.error())?;
        let Some((seq, hash)) = last else { return Ok(Head::EMPTY) };
        let hash = hash.parse().map_err(|_| StoreError::Corrupt {
            path: self.place.db.clone(),
            found: format!("the hash of event {seq}, the last, is no hash"),
            source: None,
        })?;
        Ok(Head { seq, hash })
    }

    /// All events in the order of their rows, as they lie there.
    pub fn events(&self) -> Events<'_> {
        self.events_after(i64::MIN)
    }

    /// Whether what the trail holds agrees with a head of it that was kept: it goes as far, and its event of that number
    /// has that hash, or was archived since with all before it.
    pub fn holds(&self, kept: &Head) -> Result<Held, StoreError> {
        let head = self.head()?;
        if head.seq < kept.seq {
            return Ok(Held::EndsAt(head.seq));
        }
        if head == *kept || kept.seq == 0 {
            return Ok(Held::Whole);
        }
        let found: Option<String> = self
            .prepare("SELECT hash FROM event WHERE seq = ?1")?
            .query_row([kept.seq], |row| row.get(0))
            .optional()
            .map_err(self.error())?;
        let agrees = match found {
            Some(hash) => hash.parse() == Ok(kept.hash),
            // Moved to an archive, the last event of which the trail says itself.
            None => self.base()?.is_some_and(|base| base.seq >= kept.seq),
        };
        Ok(if agrees { Held::Whole } else { Held::Otherwise })
    }

    /// The events after `seq`, to follow a trail.
    pub fn events_since(&self, seq: u64) -> Events<'_> {
        self.events_after(i64::try_from(seq).unwrap_or(i64::MAX))
    }

    fn events_after(&self, seq: i64) -> Events<'_> {
        Events { view: self, last: seq, page: Vec::new().into_iter(), ended: false }
    }
}

/// How a trail stands to a head of it that was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Whole,
    /// It was cut: this is its last event.
    EndsAt(u64),
    /// The event of that number is another, or is gone from between.
    Otherwise,
}

/// An iterator over the trail that holds a page of it at a time.
pub struct Events<'a> {
    view: &'a View<'a>,
    last: i64,
    page: std::vec::IntoIter<(i64, RecordedEvent)>,
    ended: bool,
}

const PAGE: usize = 256;

impl Events<'_> {
    fn next_page(&self) -> Result<Vec<(i64, RecordedEvent)>, StoreError> {
        let mut statement = self
            .view
            .prepare("SELECT seq, hash, body FROM event WHERE seq > ?1 ORDER BY seq LIMIT 256")?;
        statement
            .query_map([self.last], |row| {
                let seq: i64 = row.get(0)?;
                Ok((
                    seq,
                    RecordedEvent {
                        seq: u64::try_from(seq).unwrap_or(0),
                        hash: as_it_lies(row.get_ref(1)?),
                        body: as_it_lies(row.get_ref(2)?),
                    },
                ))
            })
            .and_then(Iterator::collect)
            .map_err(self.view.error())
    }
}

impl Iterator for Events<'_> {
    type Item = Result<RecordedEvent, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.as_slice().is_empty() && !self.ended {
            match self.next_page() {
                Ok(page) => {
                    self.ended = page.len() < PAGE;
                    self.page = page.into_iter();
                }
                Err(e) => {
                    self.ended = true;
                    return Some(Err(e));
                }
            }
        }
        let (seq, event) = self.page.next()?;
        self.last = seq;
        Some(Ok(event))
    }
}

/// What has been tampered with may be of any type; the audit names it, so it must not end the reading.
pub(super) fn as_it_lies(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
            String::from_utf8_lossy(bytes).into_owned()
        }
        ValueRef::Null | ValueRef::Integer(_) | ValueRef::Real(_) => String::new(),
    }
}
