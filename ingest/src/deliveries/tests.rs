use super::*;

static JUNK: [u8; 20_001] = [b'['; 20_001];

fn message(payload: &'static [u8]) -> Delivery {
    let topic = Bytes::from_static(b"og/field/S/turbine/D-1");
    Delivery::new(topic, Bytes::from_static(payload), None, Instant::now())
}

/// Refuses `parts` one-byte parts of one message.
fn refuse(deliveries: &mut Deliveries, parts: usize) {
    let delivery = message(&JUNK);
    for number in 0..parts {
        let part = delivery.payload.get(number + 1..number + 2).unwrap();
        deliveries.refuse(&delivery, part, (Reason::WrongType, format!("element {number}")), 0);
    }
    deliveries.push(delivery);
}

#[tokio::test]
async fn a_message_has_a_hundred_letters_and_one_as_a_whole() {
    for (parts, letters) in [(1, 1), (100, 100), (101, 101), (102, 101), (20_000, 101)] {
        let mut deliveries = Deliveries::new("mqtt", 1 << 20);
        refuse(&mut deliveries, parts);
        assert_eq!((deliveries.refused(), deliveries.letters.len()), (parts, letters));
        if let Some(whole) = deliveries.letters.get(100) {
            assert_eq!(whole.payload.as_ref(), JUNK);
            assert!(whole.error.contains("as a whole"), "{}", whole.error);
        }
        refuse(&mut deliveries, 1);
        assert_eq!(deliveries.letters.len(), letters + 1, "the next message has letters of its own");
    }
}

/// Otherwise a batch would fill itself with messages that grow, and close by none of its bounds.
#[tokio::test]
async fn what_a_message_grew_by_is_counted_and_its_room_in_the_queue_stays() {
    let mut deliveries = Deliveries::new("mqtt", 1 << 20);
    let mut delivery = message(b"gzip");
    let room = delivery.size();
    delivery.payload = Bytes::from(vec![b' '; 100_000]);
    deliveries.push(delivery);
    assert_eq!((deliveries.room(), deliveries.unpacked() > 99_000), ((1, room), true));
    deliveries.clear();
    assert_eq!(deliveries.unpacked(), 0);
}

/// A batch that fails as a whole is halved and decoded again, many times.
#[tokio::test]
async fn a_message_that_is_decoded_again_takes_its_allowance_once() {
    let mut deliveries = Deliveries::new("mqtt", 1 << 20);
    deliveries.limit_letters(&LetterLimit::new(3, 1 << 20));
    refuse(&mut deliveries, 2);
    for _ in 0..10 {
        for delivery in deliveries.take() {
            for number in 1..3 {
                let part = delivery.payload.get(number..=number).unwrap();
                deliveries.refuse(&delivery, part, (Reason::WrongType, String::new()), 0);
            }
            deliveries.push(delivery);
        }
        assert_eq!((deliveries.letters.len(), deliveries.suppressed()), (2, 0));
    }
    refuse(&mut deliveries, 2);
    assert_eq!((deliveries.letters.len(), deliveries.suppressed()), (3, 1));
}

#[tokio::test]
async fn a_device_over_its_limit_is_counted() {
    let mut deliveries = Deliveries::new("mqtt", 1 << 20);
    deliveries.limit_letters(&LetterLimit::new(3, 1 << 20));
    (0..10).for_each(|_| refuse(&mut deliveries, 1));
    assert_eq!((deliveries.refused(), deliveries.letters.len(), deliveries.suppressed()), (10, 3, 7));
}
