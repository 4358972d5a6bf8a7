"""Memory for small things that belong to a key: windows, names, accounts. All of it goes back to the system once they are gone.

Pieces of one size fill a chunk of 64 KiB, which is unmapped once the last of them is freed. In malloc's heap, and in an arena of
Python's allocator, a single piece in use keeps the freed memory around it. The caller holds the GIL. In a sanitize build every piece
comes from malloc, which the sanitizer watches.
"""

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #ifdef __SANITIZE_ADDRESS__
    #define rt_piece_new malloc
    #define rt_piece_free free
    #else
    #include <stddef.h>
    #include <sys/mman.h>
    #define RT_CHUNK ((size_t)65536)
    #define RT_GRAIN ((size_t)32)
    #define RT_SIZES 128                   /* of pieces: multiples of the grain, up to 4 KiB */

    struct rt_size;
    struct rt_chunk {                      /* at the beginning of each */
        struct rt_chunk *next, *before;    /* others of the size that have room */
        struct rt_size *size;              /* NULL: a single piece, larger than any size */
        void *freed;                       /* pieces: each begins with where the next one is */
        size_t mapped, used, begun, most;  /* bytes of the chunk; pieces: in use, ever used, that fit */
    };
    struct rt_size { struct rt_chunk *roomy; };
    /* Each compiled module has its own. A piece that another module frees goes back to its own chunk. */
    static struct rt_size rt_sizes[RT_SIZES];

    static __attribute__((noinline)) struct rt_chunk *rt_chunk_new(size_t bytes) {
        /* The next chunk is mostly just below the last, and aligned. Then both are one mapping; a process may have only so many. */
        char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *first = at;
        if (at == MAP_FAILED) return NULL;
        if ((uintptr_t)at & (RT_CHUNK - 1)) {
            munmap(at, bytes);
            at = mmap(NULL, bytes + RT_CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (at == MAP_FAILED) return NULL;
            first = (char *)(((uintptr_t)at + RT_CHUNK - 1) & ~(uintptr_t)(RT_CHUNK - 1));
            if (first > at) munmap(at, (size_t)(first - at));
            if (at + RT_CHUNK > first) munmap(first + bytes, (size_t)(at + RT_CHUNK - first));
        }
        ((struct rt_chunk *)first)->mapped = bytes;
        return (struct rt_chunk *)first;
    }

    static inline void rt_chunk_link(struct rt_chunk *chunk) {
        chunk->before = NULL;
        chunk->next = chunk->size->roomy;
        if (chunk->next != NULL) chunk->next->before = chunk;
        chunk->size->roomy = chunk;
    }

    static inline void rt_chunk_unlink(struct rt_chunk *chunk) {
        if (chunk->next != NULL) chunk->next->before = chunk->before;
        if (chunk->before != NULL) chunk->before->next = chunk->next;
        else chunk->size->roomy = chunk->next;
    }

    static void *rt_piece_new(size_t bytes) {
        const size_t head = (sizeof(struct rt_chunk) + RT_GRAIN - 1) / RT_GRAIN * RT_GRAIN;
        const size_t grains = bytes ? (bytes + RT_GRAIN - 1) / RT_GRAIN : 1;
        struct rt_chunk *chunk;
        void *piece;
        if (grains > RT_SIZES) {
            if (bytes > PTRDIFF_MAX / 2) return NULL;
            chunk = rt_chunk_new((head + bytes + RT_CHUNK - 1) / RT_CHUNK * RT_CHUNK);
            return chunk == NULL ? NULL : (char *)chunk + head;
        }
        chunk = rt_sizes[grains - 1].roomy;
        if (chunk == NULL) {
            chunk = rt_chunk_new(RT_CHUNK);
            if (chunk == NULL) return NULL;
            chunk->size = &rt_sizes[grains - 1];
            chunk->most = (RT_CHUNK - head) / (grains * RT_GRAIN);
            rt_chunk_link(chunk);
        }
        piece = chunk->freed;
        if (piece != NULL) chunk->freed = *(void **)piece;
        else piece = (char *)chunk + head + grains * RT_GRAIN * chunk->begun++;
        if (++chunk->used == chunk->most) rt_chunk_unlink(chunk);
        return piece;
    }

    static void rt_piece_free(void *piece) {
        struct rt_chunk *chunk = (struct rt_chunk *)((uintptr_t)piece & ~(uintptr_t)(RT_CHUNK - 1));
        if (piece == NULL) return;
        if (chunk->size == NULL) {
            munmap(chunk, chunk->mapped);
            return;
        }
        *(void **)piece = chunk->freed;
        chunk->freed = piece;
        if (chunk->used-- == chunk->most) rt_chunk_link(chunk);
        /* An empty chunk stays if no other has room: the next piece would map one again. */
        if (chunk->used == 0 && (chunk->next != NULL || chunk->before != NULL)) {
            rt_chunk_unlink(chunk);
            /* Unmapping the middle of a mapping makes two of it, and may fail if there are too many. */
            if (munmap(chunk, RT_CHUNK) != 0) rt_chunk_link(chunk);
        }
    }
    #endif
    """
    void* piece_new "rt_piece_new"(size_t size) noexcept nogil
    void piece_free "rt_piece_free"(void* piece) noexcept nogil
