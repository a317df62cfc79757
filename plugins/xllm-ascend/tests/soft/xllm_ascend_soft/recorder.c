/* The library of operators (libopapi), as names only: which kernels torch_npu launched, in order. The generated part calls soft_launch. */
#include <pthread.h>
#include <string.h>

static char names[1 << 20];
static size_t end;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int soft_launch(const char *name)
{
    size_t length = strlen(name);
    pthread_mutex_lock(&lock);
    if (end + length + 2 < sizeof names) {
        memcpy(names + end, name, length);
        end += length;
        names[end++] = ' ';
        names[end] = 0;
    }
    pthread_mutex_unlock(&lock);
    return 0;
}
const char *soft_launched(void) { return names; }
void soft_forget(void)
{
    pthread_mutex_lock(&lock);
    end = 0;
    names[0] = 0;
    pthread_mutex_unlock(&lock);
}
